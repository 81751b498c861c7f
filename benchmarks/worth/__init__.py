"""What freezing is worth: the cost of a model as good, on real data, against the best rivals.

A *question* has *tasks* (data to learn) and *methods* (ways to learn them), each with budgets of
epochs. A *run* is a method with a budget, a learning rate and a seed, in a process of its own.
"""
