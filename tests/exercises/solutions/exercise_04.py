def learned(tokens):
    marks, answering = [], False
    for i, token in enumerate(tokens):
        marks.append(answering)
        if token == "<|im_end|>":
            answering = False
        if "".join(tokens[:i + 1]).endswith("<|im_start|>assistant\n"):
            answering = True
    return marks
