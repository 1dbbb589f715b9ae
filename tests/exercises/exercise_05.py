"""5. Who may see whom?

A page's questions stand in one row behind its prefix, and must not see each other. Write the mask of the whole row.

Hint: branch 0 is the prefix. A token sees an earlier token, or itself, if that one is of the prefix or of its own branch.
See `page_mask` in model/language.py, which never builds the whole square: why not?
"""
import torch


def mask(branches):
    """Branch numbers (L,), 0 for the prefix -> bool (L, L): [i, j] says whether token i sees token j."""
    raise NotImplementedError("write me")


def test_the_square_of_the_docstring():
    assert mask(torch.tensor([0, 0, 1, 1, 2])).int().tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]


def test_its_lower_part_is_the_models():
    from model.language import page_mask
    branches = torch.tensor([0] * 9 + [1] * 4 + [2] + [3] * 6)
    assert torch.equal(mask(branches)[9:], page_mask(branches).mask)
