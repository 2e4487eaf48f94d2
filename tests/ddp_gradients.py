"""Run by torchrun: two processes with k images each have the gradients of one process with 2k (float64, BN in eval)."""

import torch
import torch.distributed as dist
from conftest import ROOT  # noqa: F401  makes the scripts importable

from gcnet import GCNet
from train import segmentation_loss


def gradients(model, images, labels):
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.Dropout2d):
            module.eval()
    logits, aux_logits = model(images)
    (segmentation_loss(logits, labels) + 0.4 * segmentation_loss(aux_logits, labels)).backward()
    return [parameter.grad for parameter in model.parameters()]


dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = GCNet(5, depth=18).double()
alone = GCNet(5, depth=18).double()
alone.load_state_dict(model.state_dict())
images, labels = torch.randn(4, 3, 32, 40).double(), torch.randint(0, 5, (4, 32, 40))
labels[0, :20] = 255
mine = slice(2 * rank, 2 * rank + 2)
shared = gradients(torch.nn.parallel.DistributedDataParallel(model), images[mine], labels[mine])
for one, two in zip(gradients(alone, images, labels), shared, strict=True):
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
print("equal")
dist.destroy_process_group()
