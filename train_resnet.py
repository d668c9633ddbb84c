"""Part 1: train the assignment's ResNet (3.6 M parameters) on CIFAR-100 from scratch.

The bar of the course is 60 % test accuracy.

    python train_resnet.py --data-dir PATH                     the recipe, for a GPU
    python train_resnet.py --epochs 9 --low-res-epochs 5       the same in an hour on two CPU cores
    python train_resnet.py --dataset synthetic --epochs 2      without data: does it run here?
    python train_resnet.py --eval-only                         test a finished run's model.pt
"""

from pathlib import Path

import torch

import data
import models
import utils

BAR = 60.0  # test accuracy in %, set by the course
LOW_RES = 20  # pixels; 0.4 x the arithmetic of 32, and the fully convolutional stages accept it
MOMENTUM = 0.9  # He et al. 2015, section 3.4, in Nesterov's form
WARMUP = 0.25  # fraction of the steps in which the rate rises, Smith & Topin 2017, arXiv:1708.07120
EVAL_BATCH = 500  # images; divides 10,000


def parse_args():
    """Read the command line; the defaults are the recipe."""
    parser = utils.common_parser(__doc__)
    parser.add_argument("--low-res-epochs", type=utils.number(int, 0), default=0, metavar="N",
        help=f"train the first N epochs on {LOW_RES} x {LOW_RES} images, over twice as fast")
    parser.set_defaults(
        output_dir=Path("output/train_resnet"),
        epochs=30,
        batch_size=125,  # divides 50,000 and 45,000: no odd batch for torch.compile
        lr=0.1,
        weight_decay=5e-4,
        label_smoothing=0.1,
    )
    return utils.parse(parser)


def main() -> None:
    """Data, model, optimizer, schedule, loop."""
    args = parse_args()
    runtime = utils.choose_runtime(args.device, args.precision, args.compile)
    dataset = data.load(args.dataset, args.data_dir, args.data_url, not args.no_download)
    train_split, val_split = data.hold_out(dataset.train, args.val_size)
    train = data.Batches(train_split, args.batch_size, data.CIFAR100_STATS, runtime)
    held_out = {
        name: data.Batches(split, EVAL_BATCH, data.CIFAR100_STATS, runtime)
        for name, split in (("val", val_split), ("test", dataset.test))
        if len(split.labels)
    }

    torch.manual_seed(args.seed)
    model = runtime.place(models.ResNet())
    utils.print_header(runtime, dataset, model, args.val_size)
    if args.eval_only:
        models.load_weights(model, args.output_dir / "model.pt")
        result = utils.evaluate(model, held_out["test"].in_order(), runtime)
        return utils.print_test(result, dataset.name)

    total_steps = min(args.epochs * len(train), args.max_steps or args.epochs * len(train))
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, MOMENTUM, weight_decay=args.weight_decay, nesterov=True,
        fused=runtime.device.type == "cuda",  # and so no synchronisation for the scaler
    )
    # The rate reaches its end one step after the last; OneCycleLR cannot do fewer than 5 steps.
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, max(total_steps, 5) + 1, pct_start=WARMUP, anneal_strategy="linear",
        cycle_momentum=False,
    )
    sizes = [LOW_RES] * args.low_res_epochs + [32] * args.epochs
    run = utils.Run(args, runtime, dataset, len(train), total_steps, sizes, parts={
        "model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": runtime.scaler(),
    })
    run.start()
    while run.epoch < run.epochs:
        batches = train.shuffled(args.seed, run.epoch, run.step, sizes[run.epoch])
        results = {"train": utils.train_one_epoch(run, batches, args.label_smoothing)}
        for name, split in held_out.items():
            watched = run.watch(split.in_order(), name, 0, len(split))
            results[name] = utils.evaluate(model, watched, runtime)
        run.end_epoch(results)
    run.finish(BAR)


if __name__ == "__main__":
    utils.run_script(main)
