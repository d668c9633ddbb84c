"""Part 1: train the assignment's ResNet (3.6 M parameters) on CIFAR-100 from scratch.

The required accuracy is 60 % on the test set. 5 epochs reach 66 %, 20 epochs 74 %; README.md says
in which time.

    python train_resnet.py --data-dir PATH                     the recipe, 20 epochs
    python train_resnet.py --data-dir PATH --epochs 5          to the required accuracy
    python train_resnet.py --dataset synthetic --epochs 2      without data: does it run here?
    python train_resnet.py --eval-only --data-dir PATH         report on a model.pt
    python train_resnet.py --predict tiger.jpg                 what is it?
"""

import argparse

import torch
from torch import Tensor, nn

import data
import engine
import models
import report
import utils
from utils import bounded

REQUIRED = 60.0  # test accuracy in %, set by the course
STATS = data.CIFAR100_STATS
SIZE = 32  # pixels
LOW_SIZE = 20  # pixels; takes 0.4 x the arithmetic of 32, and the stages accept any size
# What follows was chosen on --val-size 5000. First the peak learning rates and the decay:
MUON = {"lr": 0.1, "weight_decay": 0.01}
SGD = {"lr": 0.2, "weight_decay": 5e-4}
# Then, with Muon, what depends on --epochs: the padding of short runs at 5 epochs, all of long runs
# at 20. CutMix was not tried in short runs.
SHORT_EPOCHS = 10  # the longest run that counts as short
SHORT_RUN = {"crop_padding": 2, "cutmix": 0.0}
LONG_RUN = {"crop_padding": data.CROP_PADDING, "cutmix": 0.5}
# What runs were trained with before there were these flags.
BEFORE = {"dropout": 0.1, "crop_padding": data.CROP_PADDING, "cutmix": 0.0}
MOMENTUM = 0.9  # of Muon and of SGD, in Nesterov's form
# Beside Muon: the peak rate of batch norms and head, and the decay of the head's matrix, as usual
# for SGD. Norms and biases never have a decay.
OTHER_LR, HEAD_DECAY = 0.1, 5e-4
EVAL_BATCH = 500  # images; divides 10,000
AUGMENT = None  # or a function of (images, labels, generator): README.md, "Change it"


def parse_args() -> argparse.Namespace:
    """Read the command line; the defaults are the recipe. tests/README.md has what was tried."""
    parser = engine.Parser(__doc__, output_dir="output/train_resnet")
    recipe = parser.add_recipe
    recipe("--epochs", type=bounded(int, 1), default=20, metavar="N",
        help="passes over the training set; the schedule is stretched to fit")
    # 250 divides 50,000 and 45,000: a last batch of another size would be compiled anew.
    recipe("--batch-size", type=bounded(int, 2), default=250, metavar="N",
        help="images per optimizer step")
    recipe("--optimizer", choices=("muon", "sgd"), default="muon",
        help="muon: Muon for the convolutions, SGD for the rest; sgd: SGD for all")
    recipe("--lr", type=bounded(float, 1e-9), metavar="LR",
        help=f"peak learning rate; with muon of the convolutions alone, the rest has {OTHER_LR} "
             f"(default: {MUON['lr']}, for sgd {SGD['lr']})")
    recipe("--weight-decay", type=bounded(float, 0), metavar="WD",
        help="weight decay of the convolutions, with sgd also of the head's matrix "
             f"(default: {MUON['weight_decay']}, for sgd {SGD['weight_decay']})")
    recipe("--low-res", type=bounded(float, 0, 1), default=0.3, metavar="F",
        help=f"fraction of the epochs, rounded down, that come first, on {LOW_SIZE} x {LOW_SIZE} "
             "images, on a CPU twice as fast (progressive resizing)")
    recipe("--dropout", type=bounded(float, 0, 1), default=0.0, metavar="P",
        help="probability with which training zeroes an output of conv1")
    # Reflection does not repeat the pixels of the edge.
    recipe("--crop-padding", type=bounded(int, 0, SIZE - 1), metavar="PIXELS",
        help="by how much a random crop moves an image at most, in each direction "
             f"({default_by_length('crop_padding')})")
    parser.add_shared_recipe(cutmix_default=default_by_length("cutmix"))
    args = parser.read()
    args.recipe |= BEFORE
    chosen = SHORT_RUN if args.epochs <= SHORT_EPOCHS else LONG_RUN
    for name, value in {**chosen, **(SGD if args.optimizer == "sgd" else MUON)}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def default_by_length(name: str) -> str:
    """Return in words what a setting is by default."""
    return (f"default: {SHORT_RUN[name]:g} with --epochs up to {SHORT_EPOCHS}, "
            f"else {LONG_RUN[name]:g}")


class Muon(torch.optim.SGD):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), and SGD.

    In a group with the key "muon" (the momentum), the gradient of each convolution (out, in, k, k)
    becomes a nearly orthogonal matrix (out, in k k), with no factor for its shape. All other groups
    are plain SGD. The orthogonalisation computes in `dtype`, and unlike torch.optim.Muon for many
    matrices at once: all of one shape, or with `pad` all that have the same number of rows, the
    narrower ones padded with zeros (more arithmetic in fewer kernels, faster only on a GPU).
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype, pad: bool = False):
        super().__init__(groups)
        self.dtype, self.pad = dtype, pad
        self.zeros: dict[tuple[int, int], Tensor] = {}  # (widest, out)

    @torch.no_grad()
    def step(self) -> None:
        """Put orthogonal matrices in place of the convolutions' gradients; take SGD's step.

        SGD's own momentum is 0 in these groups: it adds the weight decay and steps.
        """
        for group in self.param_groups:
            if "muon" in group:
                weights = [weight for weight in group["params"]
                           if weight.grad is not None and weight.numel()]
                if weights:
                    self._orthogonalize_gradients(weights, group["muon"])
        super().step()

    def _orthogonalize_gradients(self, weights: list[Tensor], momentum: float) -> None:
        batches = {}
        for weight in weights:
            if "momentum_buffer" not in self.state[weight]:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            batches.setdefault(len(weight) if self.pad else weight.shape, []).append(weight)
        averages = [self.state[weight]["momentum_buffer"] for weight in weights]
        grads = [weight.grad for weight in weights]
        torch._foreach_lerp_(averages, grads, 1 - momentum)
        torch._foreach_lerp_(grads, averages, momentum)  # Nesterov's form
        orthogonal = self._padded if self.pad else self._of_one_shape
        for batch in batches.values():
            for weight, grad in zip(batch, orthogonal([w.grad for w in batch]), strict=True):
                grad = grad.to(weight.dtype, memory_format=torch.channels_last)
                # SGD wants dense gradients. This copies the slices of padded matrices alone.
                weight.grad = grad.contiguous(memory_format=torch.channels_last)

    def _of_one_shape(self, grads: list[Tensor]) -> Tensor:
        stacked = torch.stack(grads)  # (N, out, in, k, k)
        return orthogonalize(stacked.flatten(2), self.dtype).view(stacked.shape)

    def _padded(self, grads: list[Tensor]) -> list[Tensor]:
        # The columns are in the order of k, k, in, which is that of channels-last memory.
        parts = [grad.permute(2, 3, 1, 0).flatten(0, 2) for grad in grads]  # (k k in, out)
        rows, widest = len(grads[0]), max(map(len, parts))
        if (widest, rows) not in self.zeros:
            self.zeros[widest, rows] = parts[0].new_zeros(widest, rows)
        zeros = self.zeros[widest, rows]
        pieces = [piece for part in parts for piece in (part, zeros[: widest - len(part)])]
        matrices = torch.cat(pieces).view(-1, widest, rows).mT  # (N, out, widest)
        matrices = orthogonalize(matrices, self.dtype).to(grads[0].dtype)
        return [matrix[:, : len(part)].view(grad.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)
                for matrix, part, grad in zip(matrices, parts, grads, strict=True)]


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of (N, rows, columns) near 1, and keep the singular vectors.

    By five Newton-Schulz iterations U S V' becomes about U V'; columns of zeros stay zeros. The
    coefficients of x -> a x + b x^3 + c x^5 are Jordan's.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT, dtype).mT
    x = torch.empty_like(matrices, dtype=dtype)
    torch.div(matrices, matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7), out=x)
    for _ in range(5):
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return x


def load_data(args: argparse.Namespace) -> data.Dataset:
    """Return the images to train on and those to test; another set goes here."""
    return data.load(args.dataset, args.data_dir, args.data_url, not args.no_download)


def make_model(args: argparse.Namespace) -> nn.Module:
    """Return the network to train or to use; another one goes here."""
    return models.ResNet(dropout=args.dropout)


def make_optimizer(model: nn.Module, args: argparse.Namespace, runtime: utils.Runtime) -> Muon:
    """Return Muon for the convolutions and SGD for the rest, or SGD for all; with peak rates."""
    kernels = {module.weight for module in model.modules() if isinstance(module, nn.Conv2d)}
    convolutions, matrices, vectors = [], [], []
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        others = matrices if parameter.ndim > 1 else vectors
        (convolutions if parameter in kernels else others).append(parameter)
    sgd = {"momentum": MOMENTUM, "nesterov": True}
    mine = {"lr": args.lr, "weight_decay": args.weight_decay}
    if args.optimizer == "sgd":
        groups = [{"params": convolutions + matrices, **mine, **sgd},
                  {"params": vectors, "lr": args.lr, **sgd}]
    else:
        groups = [{"params": convolutions, "muon": MOMENTUM, "kind": "Muon", **mine},
                  {"params": matrices, "lr": OTHER_LR, "weight_decay": HEAD_DECAY, **sgd},
                  {"params": vectors, "lr": OTHER_LR, **sgd}]
    engine.check_groups(model, groups)
    return Muon(groups, runtime.dtype, pad=runtime.device.type != "cpu")


def main() -> None:
    """Data, model, optimizer, schedule, loop."""
    args = parse_args()
    if args.compare:
        return report.compare(args.compare, args.output_dir)
    runtime = utils.choose_runtime(args.device, args.precision, args.compile)
    torch.manual_seed(args.seed)
    model = make_model(args)
    if args.eval_only or args.predict:
        return engine.use_model(model, args, runtime, load_data, STATS, EVAL_BATCH, SIZE)

    dataset = data.hold_out(load_data(args), args.val_size)
    train = data.Batches(dataset.train, args.batch_size, STATS, runtime,
                         classes=len(dataset.class_names), padding=args.crop_padding)
    evaluated = {name: data.Batches(split, EVAL_BATCH, STATS, runtime, SIZE)
                 for name, split in dataset.evaluated().items()}

    model = runtime.place(model, args.batch_size)
    run = engine.Run(args, runtime, dataset, REQUIRED, train.steps_per_epoch)
    sizes = engine.low_resolution_first(run.epochs, args.low_res, LOW_SIZE, SIZE)
    cutmix = engine.cutmix_by_epoch(run.epochs, args.cutmix)
    optimizer = make_optimizer(model, args, runtime)
    scheduler = engine.one_cycle(optimizer, run.total_steps)
    run.start(model, optimizer, scheduler, sizes, AUGMENT)
    for epoch in range(run.epoch, run.epochs):
        batches = train.shuffled(args.seed, epoch, run.step, sizes[epoch], cutmix[epoch])
        results = {"train": engine.train_one_epoch(run, batches, args.label_smoothing)}
        for name, tested in evaluated.items():
            results[name] = engine.evaluate(model, run.watch(tested, name), runtime)
        run.end_epoch(results)
    run.finish()


if __name__ == "__main__":
    utils.run_script(main)
