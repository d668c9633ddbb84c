"""Part 2: fine-tune an ImageNet-pre-trained ResNet-18 on CIFAR-100 up-sampled to 224 x 224.

The bar of the course is 70 % test accuracy.

    python finetune_resnet18.py --data-dir PATH                   the recipe, 4 epochs
    python finetune_resnet18.py --data-dir PATH --epochs 2        half of it, and past the bar
    python finetune_resnet18.py --dataset synthetic --weights random --image-size 64
                                                                  without data: does it run here?
    python finetune_resnet18.py --eval-only --data-dir PATH       report on a model.pt
    python finetune_resnet18.py --predict tiger.jpg               what is it?

The weights are the file that --weights names, or the course's or torchvision's file beside this
script or in torch's cache, or else torchvision's own download.
"""

from pathlib import Path

import torch

import data
import models
import utils

BAR = 70.0  # test accuracy in %, set by the course
MOMENTUM = 0.9  # He et al. 2015, section 3.4, in Nesterov's form
WARMUP = 0.2  # fraction of the steps in which the rate rises, Smith & Topin 2017, arXiv:1708.07120
HEAD_RATE = 10  # the new head learns this many times faster than the pre-trained layers
EVAL_BATCH = 100  # images; divides 10,000


def parse_args():
    """Read the command line; the defaults are the recipe."""
    parser, recipe = utils.common_parser(__doc__)
    recipe.add_argument("--weights", metavar="PATH",
        help="ImageNet weights of torchvision's resnet18, or 'random' for none (a dry run)")
    recipe.add_argument("--image-size", type=utils.number(int, 32), default=224, metavar="PIXELS",
        help="side to which the images are up-sampled; the weights were trained at 224")
    recipe.add_argument("--low-res", type=utils.number(float, 0, 1), default=0.5, metavar="F",
        help="train on images of half that side in this fraction of the epochs, the first, three "
             "times as fast")
    parser.set_defaults(
        output_dir=Path("output/finetune_resnet18"),
        epochs=4,
        batch_size=100,  # divides 50,000 and 45,000: no odd batch for torch.compile
        lr=0.003,  # chosen on --val-size 5000; at 0.01 the pre-trained features are lost
        weight_decay=5e-4,
        label_smoothing=0.1,
    )
    return utils.parse(parser)


def image_sizes(args, epochs: int) -> list[int]:
    """Return the side of the training images in each epoch, in pixels: small ones first."""
    small = int(args.low_res * epochs + 1e-9)  # 0.58 x 50 is 28.999...
    half = max(args.image_size // 2, 32)  # no smaller than the data
    return [half] * small + [args.image_size] * (epochs - small)


def make_optimizer(model, args, total_steps: int, runtime: utils.Runtime):
    """Return SGD with a higher rate for the new head, and the schedule of the rates."""
    backbone = [p for name, p in model.named_parameters() if not name.startswith("fc.")]
    # If the scaler skips the first step, the fused one begins with uninitialised momentum.
    fused = runtime.device.type == "cuda" and runtime.dtype != torch.float16
    optimizer = torch.optim.SGD(
        [{"params": backbone}, {"params": list(model.fc.parameters())}], args.lr, MOMENTUM,
        weight_decay=args.weight_decay, nesterov=True, fused=fused,
    )
    # The rate reaches its end one step after the last; OneCycleLR cannot do fewer than 5 steps.
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [args.lr, HEAD_RATE * args.lr], max(total_steps, 5) + 1, pct_start=WARMUP,
        anneal_strategy="linear", cycle_momentum=False,
    )


def test(args, runtime: utils.Runtime) -> None:
    """Classify pictures with a finished run's model.pt, or report on it with the test set."""
    runtime = runtime._replace(compile=False)  # which takes longer than one pass over the images
    model = runtime.place(models.resnet18("random"))
    models.load_weights(model, args.output_dir / "model.pt")
    if args.predict:
        dataset, files = data.pictures(args.dataset, args.predict)
    else:
        dataset = data.load(args.dataset, args.data_dir, args.data_url, not args.no_download)
        utils.print_header(runtime, dataset, model, val_size=0)
    batches = data.Batches(dataset.test, EVAL_BATCH, data.IMAGENET_STATS, runtime)
    logits = utils.compute_logits(model, batches, args.image_size, runtime)
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
    train = data.Batches(train_split, args.batch_size, data.IMAGENET_STATS, runtime)
    tested = {
        name: data.Batches(split, EVAL_BATCH, data.IMAGENET_STATS, runtime)
        for name, split in (("val", val_split), ("test", dataset.test))
        if len(split.labels)
    }

    torch.manual_seed(args.seed)
    with utils.rank_0_first():  # who downloads them, if need be
        model = models.resnet18(args.weights, download=not args.no_download)
    model = runtime.place(model)
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
            watched = run.watch(batches.in_order(args.image_size), name, 0, len(batches))
            results[name] = utils.evaluate(model, watched, runtime)
        run.end_epoch(results)
    run.finish()


if __name__ == "__main__":
    utils.run_script(main)
