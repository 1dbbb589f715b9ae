from train import answer_loss


def broken(model, examples, batch_pages):
    batches = [examples[i:i + batch_pages] for i in range(0, len(examples), batch_pages)]
    total = 0.0
    for batch in batches:
        tokens = sum(example.answer_tokens for example in batch)
        packed = model.pack([(example.tiles, example.prompt) for example in batch])
        loss = answer_loss(model(packed), packed.targets) / tokens / len(batches)
        loss.backward()
        total += loss.detach()
    return total
