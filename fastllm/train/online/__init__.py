"""Stages whose data the model makes itself: ppo, with GRPO and its relatives, and conditional.

``ppo.iterate`` and ``conditional.iterate`` are one iteration of each; what they call lies in files of their own: `prompts`,
`rollout`, `reward`, `experience`, `update`. `models` holds what is run, `engines` how (one process, DDP, DeepSpeed), `state` what a
checkpoint keeps, `run` the way from a configuration to an exported model.
"""
