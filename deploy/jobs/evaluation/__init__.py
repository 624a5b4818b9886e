"""The evaluation: what `trimtab evaluate` is made of.

plan       evaluation.yaml as typed objects; checks says whether it can be carried out, prompts reads its prompts
service    the plan's models, served on a Ray cluster as deploy.yaml has it
answers    a row's answers, written through the service and kept from run to run
scoring    rewards and log-probabilities of the answers that are kept
measures   numbers out of scored answers, and fronts out of those; neither knows a file or the service
tables     the plan's tables and fronts, filled with those numbers
report     Markdown and JSON; pictures draws the PNGs
"""
