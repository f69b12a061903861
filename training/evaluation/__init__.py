"""Measures models that fill masks: ways to restore text, measures, and comparisons.

restoring   segments with fixed masks, and the model's own ways: depths and settling
rounds      decoders that run the model anew on the text so far: mask-predict and ancestral sampling
measures    exact match, runs, BLEU, and their intervals
lookups     rules that halt without a gate, and the gate against them at equal passes
levels      what the level says is left, against what is
results     the figures that come out, as plain data
table       makes all of them
causal      the left-to-right model that scores restored text
"""
