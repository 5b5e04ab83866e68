#!/usr/bin/env bash
# The whole reproduction of the paper, top to bottom, a command a table or figure.
#
#   ./reproduce.sh         # GPT-2 small as student; another: STUDENT=google/flan-t5-base ./reproduce.sh
#   ./reproduce.sh toy     # the same commands at toy size: no download, under 10 minutes on two cores
#
# Start it again after an interruption: what is finished is skipped.  What cannot run (a teacher's
# file is missing, say) stops no other study and is named at the end.  Hours are of one H200 for
# GPT-2 small, estimated from its 25,000 training tokens a second; nothing is bought: the teachers'
# completions are the published ones.  PYTHON and SAVED choose the interpreter and the folder.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python}
student=${STUDENT:-gpt2}
size=${1:-paper}
case $size in
    paper) saved=${SAVED:-saved} ;;
    toy) saved=${SAVED:-saved/reproduce_toy} ;;
    *) echo "usage: ./reproduce.sh [toy]" >&2; exit 2 ;;
esac
paper="--student $student --eval_every 1"
toy="--task toy --teacher toy --student toy --split few_shot_128 --epochs 1"
failed=()

# step WHAT COMMAND...: say what it is, run it, and remember it where it fails
step() {
    echo
    echo "==== $1"
    shift
    "$python" "$@" || failed+=("$*")
}

# study NAME "flags at the paper's size" "flags at toy size": cells of extras/studies.py
study() {
    local flags=$2
    if [ "$size" = toy ]; then flags="$toy $3"; fi
    # shellcheck disable=SC2086  # flags are words
    step "study $1" finetune_cot.py --study "$1" $flags --saved "$saved"
}

if [ "$size" = paper ]; then
    # the 12 benchmarks are downloaded: minutes
    step "benchmarks" data/prepare.py
    # the published completions of the teachers, an archive linked from the original repository
    step "teachers" data/prepare.py --completions teacher_completion_data.tar.gz --saved "$saved"
    # Table 1, the teacher's row: seconds
    step "teacher" evaluate.py score "$saved"/completion_data/B_text-davinci-002__C_zs_cot/*.json --part all
fi

#     name              at the paper's size  at toy size
# Table 1: five methods, 12 tasks, and D = 64 or 8 (diverse reasoning): 4 hours
study table_1           "$paper"          "--degree 2"
# Figure "diverse reasoning": D = 1 to 64 on multiarith and svamp, to 8 elsewhere: 3 hours more
study degree            "$paper"          "--degree 1 2 4"
# Figure "data set size": 8, 32, 128, all training questions, with and without diverse reasoning: 1 hour
study train_size        "$paper"          "--split few_shot_8 few_shot_32 few_shot_128 --degree 2"
# Figure "teacher performance": four teachers, four tasks: 20 minutes
study teachers          "$paper"          "--degree 2"
# Figure "student scale" and the appendix's tables of GPT-2, T5 and Flan-T5, three sizes each: 90 hours
study students          "--eval_every 1"  ""
# Appendix E.3: test questions of templates that training has not seen: 10 minutes
study template          "$paper"          "--split few_shot_32 few_shot_128"
# Right rationales, all, or as many of all at random: 20 minutes
study filter            "$paper"          ""
# Rationales of 32, 64, 96 words at most, and all: 20 minutes
study rationale_length  "$paper"          "--max_rationale_words 45 0"
# Learning rate x batch size: 40 minutes
study lr_batch          "$paper"          "--lr 3e-4 1e-3 --batch_size 8 16"
# Teachers prompted by Few-shot-CoT instead of Zero-shot-CoT: 20 minutes
study few_shot_teachers "$paper"          ""

# GPT-3's students of Table 1 were fine-tuned through an API that is closed; their files can be made:
#   python finetune_cot.py --stage curate --task multiarith --teacher text-davinci-002 --label_style gpt3

step "table: ours beside the paper's" evaluate.py table --saved "$saved"
if "$python" -c "import matplotlib" 2>/dev/null; then
    for kind in degree train_size teacher student curves; do
        step "figure: $kind" evaluate.py plot "$kind" --out "$saved/$kind.png" --saved "$saved"
    done
else
    echo "no figures: python -m pip install matplotlib"
fi
step "a page to look through" evaluate.py page --out "$saved/page.html" --saved "$saved"

if [ ${#failed[@]} -gt 0 ]; then
    echo
    echo "${#failed[@]} commands did not finish:" >&2
    printf '    python %s\n' "${failed[@]}" >&2
    exit 1
fi
