import torch

from model.language import KVCache, page_mask


@torch.no_grad()
def answer(model, tiles, prompt, most=16):
    cache = KVCache(model.config.language, len(prompt.ids) + most, model.device, model.dtype)
    batch = model.pack([(tiles, prompt)])
    batch.answer_index = torch.tensor([len(prompt.ids) - 1])
    logits = model(batch, [cache])
    position, branch, tokens = prompt.positions[-1], prompt.branches[-1:], []
    while len(tokens) < most and model.tokenizer.eos_token_id not in tokens:
        tokens.append(logits.argmax().item())
        position += 1
        embedded = model.language.embedding(torch.tensor(tokens[-1:]))
        hidden = model.language(embedded, torch.tensor([position]), [page_mask(torch.tensor(branch), cache)])
        logits = model.language.lm_head(hidden)
    return tokens
