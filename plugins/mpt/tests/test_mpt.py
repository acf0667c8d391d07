"""MPT with and without the clamp on query, key and value."""

from transformers import MptConfig

from awq_core.testing import ArchitectureConformance, proof_error
from awq_plugin_mpt import MPT, NORMS, VALUES

TINY = {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 128, "max_seq_len": 128}
TINY |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def mpt(**attention):
    return MptConfig(**TINY, attn_config=attention)


class TestMpt(ArchitectureConformance):
    plugin = "awq_plugin_mpt"

    @staticmethod
    def configs():
        return {
            "mpt": mpt(),
            "odd-heads": MptConfig(**{**TINY, "d_model": 96, "n_heads": 3}),
            "clamped": mpt(clip_qkv=1.0),
        }


def test_no_scale_passes_through_a_clamp():
    assert proof_error(mpt(), MPT, [*NORMS, VALUES]) < 1e-4
    assert proof_error(mpt(clip_qkv=1.0), MPT, [*NORMS, VALUES]) > 0.01
