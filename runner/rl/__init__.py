"""Post-training of language models on their own completions.

``generation``: completions as a pure function of weights, prompt and key; ``buffer``: a queue between two steps, as a
part of the state; ``rewards``; ``completion``: the task of supervised fine-tuning, and the evaluation of completions;
``grpo``: reinforcement learning with rewards that are relative to a group.
"""
