"""Every flag, field, variable and script that the five guides name, and what the scripts behind them have beside these."""

from __future__ import annotations

GUIDES: dict[str, str] = {
    "0. OPSD": """
        --model_name_or_path --train_file --output_dir --max_length --max_new_tokens --sample_limit --max_steps
        --per_device_train_batch_size --gradient_accumulation_steps --learning_rate --num_train_epochs --lmbda --bf16
        --save_strategy --save_total_limit --logging_steps --rollout_log_steps --debug_log_loss_steps
        --debug_log_grad_norm --num_processes HF_HUB_OFFLINE save_strategy=epoch save_strategy=steps/epoch
        trainer.save_model messages privileged_messages teacher_messages build_opsd_dataset.py opsd_student_messages.jsonl
        opsd_teacher_messages.jsonl opsd_combined_messages.jsonl PackageNotFoundError pip
        --save_steps --seed --fp16 --no_gradient_checkpointing --trust_remote_code --rollout_log_samples
        --rollout_log_max_new_tokens --rollout_log_max_chars share_student_as_teacher privileged_key eval_strategy
        report_to max_privileged_length beta temperature --system_prompt_path --source_csv --student_out --teacher_out
        --combined_out --include_final_assistant
    """,
    "1. Local on-policy": """
        --student_model --teacher_model --steps --batch_size --max_new_tokens --group_size --config_file --dataset
        --grad_accum --use_lora --lora_r --lora_alpha --lora_dropout --dtype --save_every --eval_every --wandb_project
        --wandb_name --wandb_mode num_processes --deepspeed_config_file ds_zero2_bf16.json --teacher_ds_zero3
        --teacher_ds_config --prompts_file --output_dir --learning_rate --weight_decay --kl_coef --kl_discount
        --temperature --top_p num_substeps accelerate launch accelerate_config_multi_gpu.yaml pip
        --seed --max_prompt_tokens
    """,
    "2. ADPA": """
        CUDA_VISIBLE_DEVICES ACCELERATE_LOG_LEVEL DS_SKIP_CUDA_CHECK accelerate.commands.launch --config_file
        deepspeed_zero3_2gpu.yaml num_processes scripts/run_sft.py scripts/run_distill_dpo.py teacher_sft.yaml
        teacher_dpo.yaml per_device_batch_size per_device_train_batch_size gradient_accumulation_steps
        model_name_or_path dataset_mixer dpo_weight beta max_seq_length max_length messages chosen rejected
        model_revision torch_dtype bf16 use_flash_attention_2 chat_template dataset_splits packing dataset_kwargs
        num_train_epochs max_steps learning_rate lr_scheduler_type warmup_ratio gradient_checkpointing
        gradient_checkpointing_kwargs output_dir overwrite_output_dir save_strategy save_steps save_only_model do_eval
        evaluation_strategy per_device_eval_batch_size logging_steps logging_strategy log_level report_to seed
        preprocessing_num_workers dataset_num_proc remove_unused_columns push_to_hub max_prompt_length optim
        sft_on_chosen distillation_weight chosen_distil_weight rejected_distil_weight adpa_weight kl_penalty_weight
    """,
    "3. DPO": """
        --model_name --load_in_8bit --beta --learning_rate --batch_size --max_steps --warmup_steps --eval_steps
        --save_steps --max_length --max_prompt_length --sanity_check --output_dir --num_workers --use_wandb --seed
        MODEL_NAME BETA BATCH_SIZE MAX_STEPS OUTPUT_DIR sbatch slurm_job.sh slurm_large_model.sh local_test.sh
        train_small_model.sh training.log train/loss train/accuracy train/reward_margin train/chosen_rewards
        train/rejected_rewards eval/* final_model checkpoint-1000 export uv
    """,
    "4. TRL": """
        GKDTrainer GKDConfig model teacher_model args train_dataset eval_dataset processing_class output_dir
        num_train_epochs per_device_train_batch_size learning_rate --model_name_or_path
        --teacher_model_name_or_path --dataset_name --output_dir load_dataset split GOLDTrainer GOLDConfig
        teacher_processing_class MiniLLMTrainer MiniLLMConfig use_distribution_distillation TINKER_API_KEY pip
        ServiceClient create_lora_training_client base_model rank forward_backward optim_step save_state
        save_weights_and_get_sampling_client name sl_basic.py rl_basic.py gradient_accumulation_steps temperature
        evaluation_strategy eval_steps per_device_eval_batch_size lm_eval --model --model_args --tasks --device
        --batch_size gradient_checkpointing
        teacher_model_name_or_path teacher_model_init_kwargs model_init_kwargs lmbda beta seq_kd max_new_tokens
        max_length disable_dropout packing teacher_tokenizer_name_or_path teacher_model_revision use_uld_loss
        use_extended_uld uld_token_merge_strategy uld_use_hybrid_loss uld_hybrid_matched_weight
        uld_hybrid_unmatched_weight uld_crossentropy_weight uld_distillation_weight uld_student_temperature
        uld_teacher_temperature uld_skip_student_eos uld_skip_teacher_eos top_p top_k max_completion_length
        num_generations generation_batch_size use_vllm vllm_mode log_completions log_completions_steps
        num_completions_to_print rkl_advantage single_step_decomposition gamma length_normalization kd_temperature
        tinker_cookbook/recipes/
    """,
}
