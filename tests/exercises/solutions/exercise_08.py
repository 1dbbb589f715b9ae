def accumulate(micro_batches, loss_sum):
    tokens, total = sum(map(len, micro_batches)), 0.0
    for micro_batch in micro_batches:
        loss = loss_sum(micro_batch) / tokens
        loss.backward()
        total += loss.detach()
    return total
