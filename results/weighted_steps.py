"""flow_grpo.py with the loss of each SDE step multiplied by its std^2 (scaled to 1 on average)

  python results/weighted_steps.py OPTIONS

If all steps but the last are random, the gradients of the late ones are by far the largest (see
where_noise_decides.png). With these weights the early ones count more than the late ones. The
official code does nearly this for CPS, whose log_prob it does not divide by 2 * std^2. The KL
penalty is not weighted. GRPO-Guard (arXiv 2510.22319) has another remedy.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import flow_grpo  # noqa: E402

unweighted_losses = flow_grpo.losses


def weighted_losses(policy, config, episodes, advantages, batch):
    policy_loss, kl, ratio = unweighted_losses(policy, config, episodes, advantages, batch)
    all_steps = torch.tensor(episodes.window)
    std = flow_grpo.make_step(episodes.times, all_steps, config.noise_level, config.sde).std
    weights = (std**2 / (std**2).mean()).flatten()  # [K], from [K, 1, 1, 1]
    k = batch[:, 1]
    return policy_loss * weights[k], kl, ratio


flow_grpo.losses = weighted_losses
flow_grpo.main()
