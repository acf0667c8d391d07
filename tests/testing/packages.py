"""Plugin packages that this project has never seen, written from docs/plugins alone, as pip would leave them.

rowan     a model class of its own: norms that multiply by 1 + weight, grouped-query attention, a gated MLP whose result
          a third linear, `mlp.gate`, opens and shuts
tamarack  a model that transformers knows and no plugin here claims: the square of ReLU in a plain MLP
"""

import textwrap
from pathlib import Path

MODELING = """
    import torch
    from torch import nn
    from torch.nn.functional import scaled_dot_product_attention, silu
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput


    class RowanConfig(PretrainedConfig):
        model_type = "rowan"

        def __init__(self, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                     intermediate_size=96, vocab_size=128, **kwargs):
            self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
            self.num_attention_heads, self.num_key_value_heads = num_attention_heads, num_key_value_heads
            self.intermediate_size, self.vocab_size = intermediate_size, vocab_size
            super().__init__(**kwargs)


    class RowanNorm(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(width))

        def forward(self, x):
            return x * (x.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt().to(x.dtype) * (1 + self.weight)


    class RowanAttention(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.head_dim = config.hidden_size // config.num_attention_heads
            kv = config.num_key_value_heads * self.head_dim
            self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            self.k_proj = nn.Linear(config.hidden_size, kv, bias=False)
            self.v_proj = nn.Linear(config.hidden_size, kv)
            self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

        def forward(self, x, seen):
            q, k, v = (
                linear(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                for linear in (self.q_proj, self.k_proj, self.v_proj)
            )
            y = scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
            return self.o_proj(y.transpose(1, 2).flatten(2))


    class RowanMLP(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
            self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
            self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
            self.gate = nn.Linear(config.hidden_size, 1, bias=False)

        def forward(self, x):
            return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x)) * self.gate(x).sigmoid()


    class RowanBlock(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.input_layernorm = RowanNorm(config.hidden_size)
            self.self_attn = RowanAttention(config)
            self.post_attention_layernorm = RowanNorm(config.hidden_size)
            self.mlp = RowanMLP(config)

        def forward(self, hidden_states, seen):
            x = hidden_states + self.self_attn(self.input_layernorm(hidden_states), seen)
            return x + self.mlp(self.post_attention_layernorm(x))


    class RowanForCausalLM(PreTrainedModel, GenerationMixin):
        config_class = RowanConfig
        base_model_prefix = "model"

        def __init__(self, config):
            super().__init__(config)
            self.model = nn.Module()
            self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.model.layers = nn.ModuleList(RowanBlock(config) for _ in range(config.num_hidden_layers))
            self.model.norm = RowanNorm(config.hidden_size)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            count = input_ids.shape[1]
            seen = torch.ones(count, count, dtype=torch.bool, device=input_ids.device).tril()[None, None]
            if attention_mask is not None:
                itself = torch.eye(count, dtype=torch.bool, device=input_ids.device)
                seen = seen & attention_mask.bool()[:, None, None] | itself
            x = self.model.embed_tokens(input_ids)
            for block in self.model.layers:
                x = block(x, seen)
            return CausalLMOutput(logits=self.lm_head(self.model.norm(x)))

        def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs):
            return {"input_ids": input_ids, "attention_mask": attention_mask}


    AutoConfig.register("rowan", RowanConfig, exist_ok=True)
    AutoModelForCausalLM.register(RowanConfig, RowanForCausalLM, exist_ok=True)
"""

ROWAN = '''
    """Rowan for awq-core: three readers behind the second norm, one of them too small to quantize."""

    from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl, presets

    ROWAN = Architecture(
        family=FAMILY,
        model_types=("rowan",),
        auto_module="awq_plugin_rowan.modeling",
        stacks=(LayerStack(component="language", blocks="model.layers"),),
        scale_groups=(
            *presets.attention(norm_offset=1.0),
            ScaleGroup(
                prev="post_attention_layernorm",
                layers=("mlp.gate_proj", "mlp.up_proj"),
                norm_offset=1.0,
                COMPENSATE
            ),
            ScaleGroup(prev="mlp.up_proj", layers=("mlp.down_proj",)),
        ),
        exempt=("mlp.gate",),  # one output
    )


    @hookimpl
    def awq_architectures():
        return [ROWAN]
'''

TAMARACK = '''
    """Tamarack for awq-core: attention as usual, and a plain MLP with the square of ReLU."""

    from awq_core.hooks import Architecture, LayerStack, ScaleGroup, hookimpl, presets

    TAMARACK = Architecture(
        family="tamarack",
        model_types=("arcee",),
        stacks=(LayerStack(component="language", blocks="model.layers"),),
        scale_groups=(
            *presets.attention(),
            ScaleGroup(prev="post_attention_layernorm", layers=("mlp.up_proj",)),
            ScaleGroup(prev="mlp.up_proj", layers=("mlp.down_proj",), degree=2),
        ),
    )


    @hookimpl
    def awq_architectures():
        return [TAMARACK]
'''

TESTS = """
    from awq_core.testing import ArchitectureConformance
    from transformers import ArceeConfig

    from awq_plugin_rowan.modeling import RowanConfig

    TINY = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }


    class TestRowan(ArchitectureConformance):
        plugin = "awq_plugin_rowan"

        @staticmethod
        def configs():
            return {"grouped-query": RowanConfig(), "multi-head": RowanConfig(num_key_value_heads=4)}


    class TestTamarack(ArchitectureConformance):
        plugin = "awq_plugin_tamarack"

        @staticmethod
        def configs():
            return {"tiny": ArceeConfig(**TINY, num_key_value_heads=2)}
"""


def install(site: Path) -> None:
    """Three distributions in `site`: rowan, tamarack, and rowan_faulty, which forgets `mlp.gate`."""
    rowan = ROWAN.replace("FAMILY", '"rowan"').replace("COMPENSATE", 'compensate=("mlp.gate",),')
    faulty = ROWAN.replace("FAMILY", '"rowan_faulty"').replace("COMPENSATE", "")
    for family, text in (("rowan", rowan), ("tamarack", TAMARACK), ("rowan_faulty", faulty)):
        package = site / f"awq_plugin_{family}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(textwrap.dedent(text))
        dist = f"awq-plugin-{family.replace('_', '-')}"
        info = site / f"awq_plugin_{family}-1.0.dist-info"
        info.mkdir()
        head = f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\nRequires-Dist: awq-core<0.2,>=0.1\n"
        (info / "METADATA").write_text(head)
        (info / "entry_points.txt").write_text(f"[awq.plugins]\n{family} = awq_plugin_{family}\n")
    (site / "awq_plugin_rowan" / "modeling.py").write_text(textwrap.dedent(MODELING))
    (site / "tests").mkdir()
    (site / "tests" / "test_both.py").write_text(textwrap.dedent(TESTS))
