from model.tiling import choose_grid


def page_tokens(width, height, max_tiles=12):
    columns, rows = choose_grid(width, height, max_tiles)
    tiles = columns * rows
    tiles += tiles > 1                                          # the thumbnail
    return tiles * (448 // 14 // 2) ** 2 + 2
