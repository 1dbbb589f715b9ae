def grid(width, height, max_tiles=12, tile_pixels=448):
    shapes = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1) if c * r <= max_tiles]
    best = (1, 1)
    for columns, rows in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        before, now = (abs(width / height - c / r) for c, r in (best, (columns, rows)))
        if now < before or now == before and width * height > 0.5 * tile_pixels ** 2 * columns * rows:
            best = columns, rows
    return best
