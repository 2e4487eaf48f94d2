"""Run by torchrun: two processes with two batches of an image each have the gradients of one process with four images
(float64, BN in eval), which they exchange once."""

import torch
import torch.distributed as dist
from conftest import ROOT  # noqa: F401  makes the scripts importable
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from gcnet import GCNet
from train import training_step


def gradients(model, batches):
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.Dropout2d):
            module.eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    training_step(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), batches, 0.1)
    return [parameter.grad for parameter in model.parameters()]


def counted(exchanges, bucket):
    exchanges.append(bucket.index())
    return allreduce_hook(None, bucket)


dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = GCNet(5, depth=18).double()
alone = GCNet(5, depth=18).double()
alone.load_state_dict(model.state_dict())
images, labels = torch.randn(4, 3, 32, 40).double(), torch.randint(0, 5, (4, 32, 40))
labels[0, :20] = 255
mine = [(images[i : i + 1], labels[i : i + 1]) for i in (2 * rank, 2 * rank + 1)]
exchanges = []
shared_model = torch.nn.parallel.DistributedDataParallel(model)
shared_model.register_comm_hook(exchanges, counted)
shared = gradients(shared_model, mine)
assert len(exchanges) == len(set(exchanges)), exchanges  # each bucket once, though there are two batches
for one, two in zip(gradients(alone, [(images, labels)]), shared, strict=True):
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
print("equal")
dist.destroy_process_group()
