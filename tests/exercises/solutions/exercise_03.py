def pixel_shuffle(patches):
    h, w, d = patches.shape
    return patches.reshape(h // 2, 2, w // 2, 2, d).transpose(0, 2, 1, 3, 4).reshape(h // 2, w // 2, 4 * d)
