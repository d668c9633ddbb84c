"""Part 1: train the assignment's ResNet (3.6 M parameters) on CIFAR-100 from scratch.

The bar of the course is 60 % test accuracy.

    python train_resnet.py --data-dir PATH                     the recipe, 20 epochs
    python train_resnet.py --data-dir PATH --epochs 5          to the bar, and not far beyond
    python train_resnet.py --dataset synthetic --epochs 2      without data: does it run here?
    python train_resnet.py --eval-only --data-dir PATH         report on a model.pt
    python train_resnet.py --predict tiger.jpg                 what is it?
"""

from pathlib import Path

import torch

import data
import models
import utils

BAR = 60.0  # test accuracy in %, set by the course
LOW_RES = 20  # pixels; 0.4 x the arithmetic of 32, and the fully convolutional stages accept it
MOMENTUM = 0.9  # of Muon and of SGD, in Nesterov's form
OTHER_LR = 0.1  # peak rate of batch norms and head, usual for SGD
HEAD_DECAY = 5e-4  # weight decay of the head's matrix, usual for SGD; the rest of SGD's has none
WARMUP = 0.2  # fraction of the steps in which the rate rises, Smith & Topin 2017, arXiv:1708.07120
EVAL_BATCH = 500  # images; divides 10,000


def parse_args():
    """Read the command line; the defaults are the recipe."""
    parser, recipe = utils.common_parser(__doc__)
    recipe.add_argument("--low-res", type=utils.number(float, 0, 1), default=0.5, metavar="F",
        help=f"train on {LOW_RES} x {LOW_RES} images in this fraction of the epochs, the first, "
             "twice as fast")
    parser.set_defaults(
        output_dir=Path("output/train_resnet"),
        epochs=20,
        batch_size=250,  # divides 50,000 and 45,000: no odd batch for torch.compile
        lr=0.1,  # and the decay: chosen on --val-size 5000, see "What was tried" in README.md
        weight_decay=0.005,
        label_smoothing=0.1,
    )
    return utils.parse(parser)


def image_sizes(args, epochs: int) -> list[int]:
    """Return the side of the training images in each epoch, in pixels: small ones first."""
    small = int(args.low_res * epochs + 1e-9)  # 0.58 x 50 is 28.999...
    return [LOW_RES] * small + [32] * (epochs - small)


class Muon(torch.optim.SGD):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), and SGD.

    In groups with "muon", their momentum, it moves convolutions (out, in, k, k), as matrices
    (out, in k k), by orthogonal matrices, with no factor for their shape; the other groups are
    SGD's. The orthogonalisation computes in `dtype`, for all matrices of a shape at once.
    (torch.optim.Muon takes matrices alone, one after the other.)
    """

    def __init__(self, groups: list[dict], lr: float, dtype: torch.dtype):
        super().__init__(groups, lr)
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        """Put orthogonal matrices in place of the convolutions' gradients; take SGD's step."""
        for group in (group for group in self.param_groups if "muon" in group):
            same_shape = {}
            for weight in group["params"]:
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                state["momentum_buffer"].lerp_(weight.grad, 1 - group["muon"])
                weight.grad.lerp_(state["momentum_buffer"], group["muon"])  # Nesterov's form
                same_shape.setdefault(weight.shape, []).append(weight.grad)
            for grads in same_shape.values():
                matrices = torch.stack(grads).flatten(2)  # (convolutions, out, in k k)
                for grad, matrix in zip(grads, orthogonalize(matrices, self.dtype), strict=True):
                    grad.copy_(matrix.view_as(grad))
        super().step()


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Bring the singular values of (N, rows, columns) near 1, by five Newton-Schulz iterations.

    The coefficients of x -> a x + b x^3 + c x^5 are Jordan's.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT, dtype).mT
    x = (matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    for _ in range(5):
        gram = x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, factor, x, beta=3.4445)
    return x


def make_optimizer(model, args, total_steps: int, runtime: utils.Runtime):
    """Return Muon for the convolutions with SGD for the rest, and the schedule of their rates."""
    sgd = {"momentum": MOMENTUM, "nesterov": True}
    convolutions, others = ([p for p in model.parameters() if p.ndim == n] for n in (4, 1))
    optimizer = Muon([
        {"params": convolutions, "muon": MOMENTUM, "weight_decay": args.weight_decay},
        {"params": [model.fc.weight], "weight_decay": HEAD_DECAY, **sgd},
        {"params": others, **sgd},
    ], args.lr, torch.bfloat16 if runtime.dtype == torch.bfloat16 else torch.float32)
    # The rate reaches its end one step after the last; OneCycleLR cannot do fewer than 5 steps.
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [args.lr, OTHER_LR, OTHER_LR], max(total_steps, 5) + 1, pct_start=WARMUP,
        anneal_strategy="linear", cycle_momentum=False,
    )


def test(args, runtime: utils.Runtime) -> None:
    """Classify pictures with a finished run's model.pt, or report on it with the test set."""
    runtime = runtime._replace(compile=False)  # which takes longer than one pass over the images
    model = runtime.place(models.ResNet())
    models.load_weights(model, args.output_dir / "model.pt")
    if args.predict:
        dataset, files = data.pictures(args.dataset, args.predict)
    else:
        dataset = data.load(args.dataset, args.data_dir, args.data_url, not args.no_download)
        utils.print_header(runtime, dataset, model, val_size=0)
    batches = data.Batches(dataset.test, EVAL_BATCH, data.CIFAR100_STATS, runtime)
    logits = utils.compute_logits(model, batches, 32, runtime)
    if args.predict:
        utils.print_predictions(logits, dataset.class_names, files)
    else:
        utils.report_test(logits, dataset, data.SUPERCLASS_OF, args.output_dir)


def main() -> None:
    """Data, model, optimizer, schedule, loop."""
    args = parse_args()
    if args.compare:
        return utils.compare(args.compare, args.output_dir)
    runtime = utils.choose_runtime(args.device, args.precision, args.compile)
    if args.eval_only or args.predict:
        return test(args, runtime)
    dataset = data.load(args.dataset, args.data_dir, args.data_url, not args.no_download)
    train_split, val_split = data.hold_out(dataset.train, args.val_size)
    train = data.Batches(train_split, args.batch_size, data.CIFAR100_STATS, runtime)
    tested = {
        name: data.Batches(split, EVAL_BATCH, data.CIFAR100_STATS, runtime)
        for name, split in (("val", val_split), ("test", dataset.test))
        if len(split.labels)
    }

    torch.manual_seed(args.seed)
    model = runtime.place(models.ResNet())
    utils.print_header(runtime, dataset, model, args.val_size)

    total_steps = min(args.epochs * len(train), args.max_steps or args.epochs * len(train))
    optimizer, scheduler = make_optimizer(model, args, total_steps, runtime)
    sizes = image_sizes(args, -(-total_steps // len(train)))
    run = utils.Run(args, BAR, runtime, dataset, len(train), total_steps, sizes, parts={
        "model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": runtime.scaler(),
    })
    run.start()
    while run.epoch < run.epochs:
        shuffled = train.shuffled(args.seed, run.epoch, run.step, sizes[run.epoch])
        results = {"train": utils.train_one_epoch(run, shuffled, args.label_smoothing)}
        for name, batches in tested.items():
            watched = run.watch(batches.in_order(), name, 0, len(batches))
            results[name] = utils.evaluate(model, watched, runtime)
        run.end_epoch(results)
    run.finish()


if __name__ == "__main__":
    utils.run_script(main)
