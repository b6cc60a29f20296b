"""Under ZeRO-3 the draw holds at most one layer's full parameters beside the shards."""

import pytest

import ranks
import tiny
from earlybert import dist, state
from memory import PeakBytes

LAYERS, HIDDEN, NEURONS, VOCABULARY = 12, 64, 256, 512
BUCKET = 1000
"""Elements; DeepSpeed allocates it again in each engine, whatever the model."""
LAYER_BYTES = 4 * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * NEURONS)
EMBEDDING_BYTES = 4 * VOCABULARY * HIDDEN


def peaks_of_a_draw():
    """{part of the draw: (peak bytes that it made, those that it left)}, 16-bit shards, the model in fp32."""
    shape = tiny.config(
        num_hidden_layers=LAYERS, hidden_size=HIDDEN, intermediate_size=NEURONS, vocab_size=VOCABULARY
    )
    settings = tiny.settings(moments="keep", minimum_step=2, latest_step=2)
    engine = tiny.engine(3, "bf16", settings, model_config=shape, bucket=BUCKET)
    state.CHUNK = 2**14  # as much smaller than a layer as the real one than BERT-Base's
    peaks = {}

    def watch(part):
        call = getattr(engine, part)

        def watched(*arguments, **options):
            with PeakBytes() as bytes_:
                result = call(*arguments, **options)
                peaks[part] = bytes_.peak, bytes_.now
            return result

        setattr(engine, part, watched)

    for part in ("_cut_state", "_build", "_open"):
        watch(part)
    tiny.train(engine, range(2))
    assert engine.ticket is not None
    elements = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    engine.close()
    return peaks, 2 * elements / dist.world_size(), 4 * elements


@pytest.mark.thorough
def test_a_draw_under_zero_3_holds_one_layer_beside_the_shards():
    for peaks, shards, whole in ranks.run("test_draw_memory:peaks_of_a_draw", ranks=2):
        layer = max(LAYER_BYTES, EMBEDDING_BYTES)
        assert whole > 8 * layer, "the whole model would be seen"
        beyond = {part: peak - left for part, (peak, left) in peaks.items()}
        assert beyond["_cut_state"] <= layer, (peaks, layer)
        assert peaks["_build"][0] <= 1.02 * shards + layer, (peaks, layer, shards)  # odd sizes are padded
        # DeepSpeed moves its 16-bit shards into one buffer.
        assert beyond["_open"] <= layer + shards, (peaks, layer, shards)
