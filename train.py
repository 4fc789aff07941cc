"""Train LaVIN's adapters: mixture-of-modality training, section 3.1 of the paper. The loop is in `train`.

    python train.py                                      the built-in small world, a CPU is enough
    python train.py --recipe paper --llama LLaMA-7B --clip ViT-L-14 --data ScienceQA       one GPU
    torchrun --nproc_per_node 8 train.py --recipe paper ..                                 eight GPUs

Data parallelism is done by hand, without DistributedDataParallel. A global batch mixes samples with and
without an image. It is split over the ranks, and on each rank into micro-batches, one per accumulation step.
Each rank adds up the gradients of its samples, one all-reduce sums the adapters' gradients over the ranks,
and every rank takes the same step. The update does not depend on how a batch is split, apart from rounding.

The folder --out holds adapters.safetensors, checkpoint.pt, log.jsonl, and curve.png, a chart of the log.
--resume goes on from checkpoint.pt; on a CPU the result has the same bits as a run that was never stopped.
"""
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import cli  # first: from here on, Ctrl-C prints one line, not a traceback, even while torch is imported

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import data
import prompts
from adapters import AdapterConfig, trainable
from clip import MEAN_STD, VisionTransformer
from evaluation import chart
from evaluation.log import Record
from lavin import LaVIN, LaVINConfig, negative_log_likelihood
from llama import LLaMA
from official.saving import lock_folder
from official.tokenizer import Tokenizer
from speed import loading, price, shard
from speed.chunked_loss import in_chunks

SMALL_WORLD = "tiny/data"

@dataclass
class Config:
    """Train LaVIN's adapters. Without arguments: the built-in small world, a few minutes on a laptop."""
    # cli.py reads these lines: each is a flag, its comment is the help text, and [a, b] at the end its range
    recipe: str = "tiny"  # set of defaults: tiny, or paper (LLaMA-7B on ScienceQA)
    llama: str = "tiny/llama"  # folder of LLaMA weights, with tokenizer.model
    clip: str = "tiny/clip"  # folder of CLIP weights, or OpenAI's .pt file
    data: str = SMALL_WORLD  # folder in ScienceQA's layout, or a mixture such as alpaca:FILE,llava:PATH
    out: str = "out"  # folder of the run
    resume: bool = False  # continue from OUT/checkpoint.pt
    # model: the choices of Table 2
    vision: bool = True  # --no-vision: text only, without image encoder
    vit_adapters: bool = True  # adapters in the image encoder too ("joint optimisation")
    adapter: str = "mm"  # in LLaMA: mm (with router) or rep (plain RepAdapter)
    adapter_dim: int = 8  # r, the number of hidden units of an adapter; even [2, 1024]
    scale: float = 1.0  # s of Eq. (2), which scales the adapters' output (0, 1000000]
    tau: float = 10.0  # temperature of the softmax of Eq. (3); the paper: 10 for 7B, 5 for 13B (0, 1000000]
    dropout: float = 0.0  # share of an adapter's hidden units that is dropped [0, 1)
    normalize: str = "clip"  # mean and std of the images: imagenet or clip
    # data
    format: str = "QCM-EA"  # prompt: Question, Context, Multiple choice; response: Explanation, then Answer
    captions: bool = False  # add to each hint a caption of its image, from captions.json in the data folder
    max_len: int = 192  # longest sequence in tokens; longer ones are cut [2, inf)
    # optimisation
    epochs: float = 1.5  # passes over the train split (0, 1000000]
    warmup: float = 0.06  # epochs of linear warm-up [0, 1000000]
    batch_size: int = 32  # samples per optimizer step, over all ranks and accumulation steps [1, inf)
    micro_batch: int = 32  # samples per forward pass [1, inf)
    lr: float = 0.048  # base learning rate; the rate used is lr x batch_size / 256 [0, inf)
    weight_decay: float = 0.02  # decay of trained matrices; biases do not decay [0, inf)
    beta2: float = 0.95  # AdamW's beta2; its beta1 is 0.9 [0, 1)
    clip_grad: float = 0.0  # largest gradient norm; 0: no clipping [0, inf)
    seed: int = 0  # decides initial adapters, data order and dropout [0, inf)
    steps: int = 0  # stop after this many steps in all; 0: after the last epoch [0, inf)
    # machine
    dry_run: bool = False  # print memory and time, do not train; --llama 7B --clip ViT-L/14 need no files
    recompute_blocks: bool = False  # gradient checkpointing: keep less in memory, compute each block twice
    device: str = "auto"  # cuda, mps, cpu, ..
    dtype: str = "auto"  # of the frozen base: bf16 or fp32; auto: bf16 on CUDA, fp32 on a CPU
    bits: int = 16  # 4: keep LLaMA's frozen matrices in 4 bits, as QLoRA does; 16: uncompressed, in --dtype
    shard: bool = False  # spread LLaMA's blocks over the GPUs of the run (FSDP); no test after training
    workers: int = -1  # processes that decode images; -1: 4 with a GPU, none on a CPU [-1, 256]
    log_every: int = 10  # steps between log lines [1, inf)
    save_every: int = 100  # steps between writings of OUT/checkpoint.pt [1, inf)
    # evaluation
    split: str = "test"  # split answered after training; "": none
    max_new_tokens: int = 48  # longest answer [1, 1048576]


RECIPES = {"tiny": {}, "paper": dict(
    # from the paper; the defaults of adapter_dim, tau, batch_size and weight_decay are the paper's, too
    epochs=20.0, lr=9e-3,
    # from the released code, because the paper does not say; the defaults of scale and beta2 are as released
    format="QCM-ALE", normalize="imagenet", dropout=0.1, max_len=512, warmup=2.0, micro_batch=4,
    max_new_tokens=256)}


def schedule(step: int, warmup: int, total: int) -> float:
    """The learning rate as a fraction of its peak: up in `warmup` steps, then a cosine to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup  # released code: step / warmup, so its first update is lost
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def optimizer_for(params: dict[str, torch.nn.Parameter], cfg: Config) -> torch.optim.AdamW:
    for p in params.values():
        # a batch without images gives the ViT's adapters no gradient. We keep zeros, not None, so that every
        # rank can join the all-reduce, and AdamW still applies momentum and weight decay
        p.grad = torch.zeros_like(p)
    groups = [{"params": [p for p in params.values() if p.ndim >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in params.values() if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, cfg.beta2), fused=True)  # the loop sets lr


def sum_over_ranks(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, with a single all-reduce."""
    flat = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(flat)
    for x, total in zip(tensors, flat.split([x.numel() for x in tensors])):
        x.copy_(total.view_as(x))


def build(cfg: Config, device, dtype) -> tuple[LaVIN, Tokenizer]:
    """A LaVIN with untrained adapters, and its tokenizer."""
    llama = LLaMA.from_pretrained(cfg.llama, device, dtype, loading.after_read(cfg, device))
    llama.recompute_blocks = cfg.recompute_blocks
    vit = VisionTransformer.from_pretrained(cfg.clip, device, dtype) if cfg.vision else None
    tokenizer = Tokenizer(cfg.llama, llama.cfg.vocab_size)
    if cfg.max_len > llama.cfg.max_seq_len:
        raise ValueError(f"--max_len {cfg.max_len}: more than the LLaMA's context of {llama.cfg.max_seq_len}")
    torch.manual_seed(cfg.seed)  # every rank starts with the same adapters
    adapter = AdapterConfig(cfg.adapter, cfg.adapter_dim, cfg.scale, cfg.tau, cfg.dropout)
    model = LaVIN(llama, vit, LaVINConfig(adapter, cfg.vision, cfg.vit_adapters, normalize=cfg.normalize))
    # the same L in less memory: only 256 targets have logits at a time, and none are kept for backward().
    # Without this line, training gives the same adapters, apart from rounding
    model.loss = in_chunks(negative_log_likelihood)
    return model.to(device), tokenizer


def read_data(cfg: Config) -> tuple[list, list]:
    """Return two lists: the pairs (data set, training samples) for the data sets of --data, and the test
    problems to answer after training. These come from the first data set in ScienceQA's layout; without
    one, the second list is empty. --no-vision leaves out the images, not the samples."""
    read = lambda source, split: source.read(split, cfg.format, cfg.captions, cfg.vision)
    training = [(source, read(source, "train")) for source in prompts.mixture(cfg.data)]
    scienceqa = [source for source, _ in training if source.kind == "scienceqa"]
    test_problems = read(scienceqa[0], cfg.split) if scienceqa and cfg.split else []
    return training, test_problems


def prepare(cfg: Config, device, dtype) -> tuple[LaVIN, Tokenizer, data.Steps, list]:
    """Model, tokenizer, training batches, and the problems that are answered after training."""
    training, test_problems = read_data(cfg)
    model, tokenizer = build(cfg, device, dtype)
    n_visual, image_size = (model.vit.n_visual, model.vit.cfg.image_size) if model.vit else (0, 0)
    examples = []
    for source, samples in training:
        kept, count = data.encode_all(samples, tokenizer, n_visual, cfg.max_len)
        cli.say(f"data {source}: " + ", ".join(f"{n} {what}" for what, n in count.items()))
        examples += kept
    if not examples:
        raise ValueError(f"{cfg.data}: no sample of the train split has a response within --max_len")
    rank, ranks = cli.processes()
    # with --shard, every forward pass needs all ranks, so all need the same number of micro-batches
    Steps = shard.Steps if cfg.shard else data.Steps
    dataset = Steps(examples, cfg.batch_size, cfg.micro_batch, rank=rank, ranks=ranks, seed=cfg.seed,
                    image_size=image_size, normalize=cfg.normalize, masks=data.MaskSampler.of(model))
    return model, tokenizer, dataset, test_problems


def loader_of(dataset: data.Steps, first: int, stop: int, workers: int, device: torch.device) -> DataLoader:
    """dataset[first], .., dataset[stop - 1]. On a GPU, other processes make them while the GPU computes."""
    cuda = device.type == "cuda"
    workers = workers if workers >= 0 else 4 * cuda
    return DataLoader(dataset, batch_size=None, sampler=range(first, stop), num_workers=workers,
                      pin_memory=cuda)


def summary(cfg: Config, theta_a: dict, per_epoch: int, total: int, warmup: int) -> str:
    """What a run prints before it starts. A batch may be "2 accumulation steps x 4 processes x 4 samples"."""
    _, ranks = cli.processes()
    n_trained = sum(p.numel() for p in theta_a.values())
    accumulation = math.ceil(cfg.batch_size / (cfg.micro_batch * ranks))
    return (f"{n_trained:,} trainable parameters; {total} steps, {per_epoch} an epoch, {warmup} for warm-up; "
            f"{accumulation} accumulation steps x {ranks} processes x "
            f"{cfg.batch_size / accumulation / ranks:g} samples = {cfg.batch_size} samples a step; "
            f"peak lr {cfg.lr * cfg.batch_size / 256:.2e}"
            + ("; sharded, so without a test" if cfg.shard else ""))


def train(cfg: Config, device: torch.device, dtype: torch.dtype) -> None:
    _, ranks = cli.processes()
    out = lock_folder(cfg.out, "train.lock") if cli.is_main() else Path(cfg.out)  # one run at a time in out
    model, tokenizer, dataset, test_problems = prepare(cfg, device, dtype)
    theta_a = trainable(model)
    optimizer = optimizer_for(theta_a, cfg)
    total, warmup = max(1, round(cfg.epochs * dataset.per_epoch)), round(cfg.warmup * dataset.per_epoch)
    stop, peak_lr = min(cfg.steps or total, total), cfg.lr * cfg.batch_size / 256
    cli.say(f"{device}, {dtype}: {summary(cfg, theta_a, dataset.per_epoch, total, warmup)}")
    record = Record(cfg, dtype, model, optimizer, dataset, stop)  # log.jsonl and checkpoint.pt
    first = record.start()  # 0; with --resume, restores adapters and optimizer and returns the steps done
    loader = loader_of(dataset, first, stop, cfg.workers, device)

    # Eq. (4): theta_a* = argmin L(f_phi(Z), R; theta_a), by steps of AdamW; f_phi, the LLM, is frozen
    for step, (micro_batches, n_targets) in enumerate(loader, start=first):
        optimizer.zero_grad(set_to_none=False)  # zero, not None: a batch may lack images
        loss = torch.zeros((), device=device)
        for batch in micro_batches:
            with model.autocast():
                L = model(batch.to(device))  # L(f_phi(Z), R; theta_a) of this micro-batch, Eq. (5)
            # n_targets counts the targets of the whole batch, on all ranks. So the sum of L / n_targets over
            # micro-batches and ranks is the mean loss per target
            (L / n_targets).backward()
            loss += L.detach() / n_targets
        if ranks > 1:
            sum_over_ranks([loss, *(p.grad for p in theta_a.values())])
        # clip_grad_norm_ also returns the norm, for the log; a limit of inf clips nothing
        norm = torch.nn.utils.clip_grad_norm_(theta_a.values(), cfg.clip_grad or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * schedule(step, warmup, total)
        optimizer.step()  # moves theta_a towards theta_a*
        record.step(step, loss, norm)

    if cli.is_main():
        model.save(out / "adapters.safetensors", format=cfg.format, captions=cfg.captions,
                   max_new_tokens=cfg.max_new_tokens, train=asdict(cfg))
        cli.say(f"wrote {out / 'adapters.safetensors'} and {chart.curve(out / 'log.jsonl')}")
    if test_problems and not cfg.shard:  # each rank answers its own share, which a sharded model cannot do
        from evaluation import answering
        answering.answer_split(model, tokenizer, test_problems, out, cfg.max_new_tokens)


def main() -> None:
    cfg = cli.parse(Config, RECIPES)
    for flag, known in ("normalize", [*MEAN_STD]), ("adapter", ["mm", "rep"]):
        if getattr(cfg, flag) not in known:
            raise ValueError(f"unknown --{flag} {getattr(cfg, flag)!r}; known: {', '.join(known)}")
    if cfg.adapter_dim % 2:
        raise ValueError(f"--adapter_dim {cfg.adapter_dim}: expected an even number; phi_u has two groups")
    if cfg.dry_run:
        return print(price.quote(cfg))  # the predicted memory and time
    device, dtype = cli.pick_device(cfg.device, cfg.dtype)
    if cli.is_main() and SMALL_WORLD in (source.path for source in prompts.mixture(cfg.data)):
        from tiny import world
        world.ensure(SMALL_WORLD)  # generate the small world, unless it exists
    with cli.process_group("nccl" if device.type == "cuda" else "gloo"):  # all ranks meet here
        train(cfg, device, dtype)


if __name__ == "__main__":
    cli.run(main)
