"""Tables of config.json keys: which are read, which must have one value, which never change the arithmetic.

Knows nothing of how a file is read.
"""

from __future__ import annotations

# Read for every family.
_SHARED = """
    architectures model_type dtype torch_dtype hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim vocab_size max_position_embeddings rms_norm_eps tie_word_embeddings layer_types
    rope_theta rope_scaling rope_parameters original_max_position_embeddings bos_token_id eos_token_id
"""
SHARED_KEYS = frozenset(_SHARED.split())

# One value is computed here; null and absent mean that value. `pretraining_tp` above 1 sums in another order.
FIXED_KEYS: dict[str, object] = {
    "hidden_act": "silu",
    "is_causal": True,
    "partial_rotary_factor": 1.0,
    "pretraining_tp": 1,
    "rope_interleaved": False,
}

_GENERATION_KEYS = """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores prefix
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature top_k top_p typical_p
"""
_TRAINING_KEYS = """
    attention_dropout attn_dropout classifier_dropout embd_pdrop hidden_dropout initializer_range residual_dropout
    resid_pdrop
"""
_NAME_KEYS = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path attn_implementation finetuning_task
    id2label is_llama_config label2id max_sequence_length name_or_path num_labels output_attentions
    output_hidden_states pad_token_id problem_type return_dict sep_token_id decoder_start_token_id unk_token_id
    task_specific_params tokenizer_class transformers.js_config transformers_version unsloth_fixed unsloth_version
    use_cache
"""

# Names, training and sampling settings: the hidden states and logits of a forward pass don't depend on them.
HARMLESS_KEYS = frozenset((_GENERATION_KEYS + _TRAINING_KEYS + _NAME_KEYS).split())
