"""Where fastmim's step spends its time."""

import statistics

from contestants import Batch, Contestant
from measure import Stopwatch

STAGES = ("masking", "embed", "encoder", "decoder assembly", "decoder", "loss", "backward", "optimiser")


def breakdown(contestant: Contestant, batches: list[Batch]) -> dict[str, float]:
    """Median seconds of each stage over one step per batch, told apart by hooks on the modules between them.

    Decoder assembly is the narrowing to the decoder's width, mask tokens and positions.
    """
    model, laps = contestant.model, []
    watch = Stopwatch(contestant.setting.device)

    def mark(*_: object) -> None:
        watch.mark()

    hooks = [
        model.patch_embed.register_forward_pre_hook(mark),
        model.patch_embed.register_forward_hook(mark),
        model.decoder_embed.register_forward_pre_hook(mark),
        model.decoder_blocks[0].register_forward_pre_hook(mark),
        model.decoder_pred.register_forward_hook(mark),
    ]
    for batch in batches:
        watch.marks.clear()
        watch.mark()
        with contestant.setting.autocast():
            loss = contestant.loss(batch)
        watch.mark()
        loss.backward()
        watch.mark()
        contestant.optimizer.step()
        contestant.optimizer.zero_grad(set_to_none=True)
        watch.mark()
        laps.append(watch.laps())
    for hook in hooks:
        hook.remove()
    return {stage: statistics.median(seconds) for stage, seconds in zip(STAGES, zip(*laps), strict=True)}
