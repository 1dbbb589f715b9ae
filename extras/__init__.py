"""What you may skip: where rows come from, the run folder, evaluation, chat, export. May import data.py and model/."""
