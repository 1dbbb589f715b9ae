import torch

from model.language import Cache, look_back


@torch.no_grad()
def answer(model, tiles, prompt, most=16):
    cache = Cache(model.config.language, len(prompt.ids) + most, model.device, model.dtype)
    hidden = model.read(model.pack([(tiles, prompt)]), [cache])[-1:]
    position, branch, tokens = prompt.positions[-1], prompt.branches[-1:], []
    while len(tokens) < most and model.tokenizer.eos_token_id not in tokens:
        tokens.append(model.language.head(hidden).argmax().item())
        position += 1
        embedded = model.language.embedding(torch.tensor(tokens[-1:]))
        hidden = model.language(embedded, torch.tensor([position]), [look_back(torch.tensor(branch), cache)])
    return tokens
