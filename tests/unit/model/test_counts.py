"""Parameter and FLOP counts against published sizes, derived golden values and torch's own FLOP counter."""

from __future__ import annotations

import pytest

from nemo_align.config.model import ModelConfig
from nemo_align.model.counts import count_parameters, flops, head_dim, padded_vocab_size

SEQUENCE = 4096


def _model(layers: int, hidden: int, ffn: int, heads: int, groups: int, head: int | None = None, vocab: int = 256000):
    return ModelConfig(
        name="test",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head,
        vocab_size=vocab,
    )


MODEL_340B = _model(96, 18432, 73728, 96, 8)


def test_parameters_of_the_340b() -> None:
    count = count_parameters(MODEL_340B)
    assert head_dim(MODEL_340B) == 192
    assert (count.layers, count.output, count.norms) == (331_584_897_024, 4_718_592_000, 7_114_752)
    assert count.layers + count.norms == 331_592_011_776  # the report's 331.6B non-embedding parameters
    assert count.embedding + count.output == 9_437_184_000  # its 9.4B embedding parameters
    assert count.total == 341_029_195_776


@pytest.mark.parametrize(
    ("model", "parameters", "full", "causal"),
    [
        (_model(32, 3072, 9216, 24, 8, 128), 4_190_509_056, 103_439_992_356_864, 93_544_387_706_880),
        (_model(32, 4096, 16384, 32, 32), 8_540_135_424, 210_487_757_242_368, 197_293_617_709_056),
        (_model(32, 6144, 24576, 48, 8), 15_628_775_424, 385_000_868_413_440, 365_209_659_113_472),
        (_model(40, 6144, 24576, 48, 48), 21_266_116_608, 533_434_938_163_200, 508_695_926_538_240),
        (MODEL_340B, 341_029_195_776, 8_621_236_313_653_248, 8_443_115_429_953_536),
    ],
    ids=["4b", "8b", "15b", "22b", "340b"],
)
def test_one_sequence_of_4096(model: ModelConfig, parameters: int, full: int, causal: int) -> None:
    work = {"tokens": SEQUENCE, "squared_tokens": SEQUENCE**2, "logit_tokens": SEQUENCE}
    assert count_parameters(model).total == parameters
    assert flops(model, **work) == full
    assert flops(model, **work, causal=True) == causal


@pytest.mark.parametrize(
    ("lengths", "with_logits", "full", "causal"),
    [
        ([2048, 1024, 512, 512], True, 8_387_452_653_797_376, 8_326_223_600_025_600),
        ([1024] * 4, True, 8_354_054_988_103_680, 8_309_524_767_178_752),
        ([4096], False, 8_505_272_196_661_248, 8_327_151_312_961_536),  # reward model
        ([2048] * 2, True, 8_443_115_429_953_536, 8_354_054_988_103_680),  # a preference pair
    ],
)
def test_stages_of_the_340b(lengths: list[int], with_logits: bool, full: int, causal: int) -> None:
    work = {
        "tokens": sum(lengths),
        "squared_tokens": sum(length**2 for length in lengths),
        "logit_tokens": sum(lengths) if with_logits else 0,
    }
    assert flops(MODEL_340B, **work) == full
    assert flops(MODEL_340B, **work, causal=True) == causal


def test_reference_pass_is_a_third() -> None:
    pair = flops(MODEL_340B, tokens=4096, squared_tokens=8_388_608, logit_tokens=4096)
    assert pair // 3 == 2_814_371_809_984_512 and pair % 3 == 0
    assert pair + pair // 3 == 11_257_487_239_938_048


def test_table_2_of_the_report() -> None:
    """MFU in percent of 989 TFLOP/s: 42.4, 42.3 and 41.0 there, whose iteration times are rounded to 0.1 s."""
    for gpus, seconds, batch, percent in [(1536, 10.3, 768, 42.3), (3072, 10.3, 1536, 42.3), (6144, 8.0, 2304, 40.9)]:
        step = flops(
            MODEL_340B, tokens=batch * SEQUENCE, squared_tokens=batch * SEQUENCE**2, logit_tokens=batch * SEQUENCE
        )
        assert round(100 * step / (seconds * gpus * 989e12), 1) == percent
    assert step > 2**63  # so it must not pass through an int64


def test_numpy_counts_do_not_overflow() -> None:
    import numpy

    tokens = numpy.int64(2304 * SEQUENCE)
    step = flops(MODEL_340B, tokens=tokens, squared_tokens=tokens * SEQUENCE, logit_tokens=tokens)
    assert step == 2304 * 8_621_236_313_653_248


@pytest.mark.parametrize(
    ("head", "parameters", "full"), [(8, 205_952, 39_321_600), (16, 246_912, 50_331_648)], ids=["q=h", "q=2h"]
)
def test_equal_to_torchs_flop_counter(head: int, parameters: int, full: int) -> None:
    """torch counts what Hugging Face's Nemotron computes, eager attention, forward and backward."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import NemotronConfig, NemotronForCausalLM

    model = _model(4, 64, 256, 8, 2, head, vocab=256)
    reference = NemotronForCausalLM(
        NemotronConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=head,
            attn_implementation="eager",
        )
    )
    with FlopCounterMode(display=False) as counter:
        reference(torch.arange(32)[None]).logits.sum().backward()
    assert sum(parameter.numel() for parameter in reference.parameters()) == count_parameters(model).total == parameters
    assert flops(model, tokens=32, squared_tokens=32**2, logit_tokens=32) == counter.get_total_flops() == full


def test_vocabulary_padding() -> None:
    assert padded_vocab_size(MODEL_340B, tensor=8) == 256_000  # 250 x 1024: nothing to pad
    odd = _model(4, 64, 256, 8, 2, vocab=32_001)
    assert [padded_vocab_size(odd, tensor) for tensor in (1, 2, 8)] == [32_128, 32_256, 32_768]


def test_hidden_size_that_heads_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"model\.hidden_size=100 .*set model\.head_dim"):
        head_dim(_model(4, 100, 256, 8, 2))
