"""flow_grpo.py with steps that count the same: python results/equal_steps.py OPTIONS

If all steps are random, the late ones have by far the largest gradients, because log_prob divides
by their small std^2 (see where_noise_decides.png). Here the loss of each step is multiplied by its
std^2, which makes the gradients about equally large. (The official code does the same for CPS: its
log_prob has no std.) GRPO-Guard (arXiv 2510.22319) has a more careful way.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import flow_grpo  # noqa: E402

losses = flow_grpo.losses


def equal_losses(policy, config, drawn, advantages, batch):
    policy_loss, kl, ratio = losses(policy, config, drawn, advantages, batch)
    all_steps = torch.tensor(drawn.window)
    std = flow_grpo.make_step(drawn.times, all_steps, config.noise_level, config.sde).std
    weights = (std**2 / (std**2).mean()).flatten()  # 1 on average
    _, k = batch.unbind(1)
    return policy_loss * weights[k], kl, ratio


flow_grpo.losses = equal_losses
flow_grpo.main()
