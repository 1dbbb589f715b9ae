def learned(tokens):
    marks, answering = [], False
    for i, token in enumerate(tokens):
        marks.append(answering)
        if token == "<|im_end|>":
            answering = False
        if token == "\n" and tokens[i - 2:i] == ["<|im_start|>", "assistant"]:
            answering = True
    return marks
