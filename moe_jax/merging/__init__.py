"""Models tuned apart from one base, merged into one: methods on deltas, recipes, cards."""
