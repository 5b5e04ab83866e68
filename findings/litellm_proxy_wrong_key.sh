#!/usr/bin/env bash
# LiteLLM 1.108.7, its proxy with a master key and no database: one would guess that a request with a wrong key is
# a 401, by which clients know that no other attempt can succeed.  It is a 400, "No connected db.", as if the
# request itself were at fault; so is an unknown model, where OpenAI answers 404.  With the right key the same
# request is a 200.  So: a client that stops at 401 and goes on after a 400 asks everything in vain; stop, too, when
# the first few requests all get the same 400.
#
# Fails if a wrong key becomes a 401, or an unknown model a 404.
set -euo pipefail
folder=$(mktemp -d)
proxy=
trap '[ -z "$proxy" ] || kill "$proxy" 2>/dev/null; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'litellm[proxy]==1.108.7'
cat > "$folder/config.yaml" <<'YAML'
model_list:
  - model_name: mock
    litellm_params: {model: openai/mock, api_key: unused, mock_response: "It is five."}
YAML
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export LITELLM_MASTER_KEY=sk-right-0123456789abcdef LITELLM_LOCAL_MODEL_COST_MAP=True NO_PROXY=127.0.0.1
unset DATABASE_URL
"$folder/venv/bin/litellm" --config "$folder/config.yaml" --host 127.0.0.1 --port "$port" > "$folder/log" 2>&1 &
proxy=$!

ask() {  # key, model -> the status and the answer
    local body="{\"model\": \"$2\", \"messages\": [{\"role\": \"user\", \"content\": \"2 + 3?\"}]}"
    curl --silent --max-time 30 --output "$folder/answer" --write-out '%{http_code}' \
        --header "Authorization: Bearer $1" --header 'Content-Type: application/json' \
        --data "$body" "http://127.0.0.1:$port/v1/chat/completions" || true
}

for _ in $(seq 120); do
    [ "$(ask "$LITELLM_MASTER_KEY" mock)" = 200 ] && break
    sleep 1
done
right=$(ask "$LITELLM_MASTER_KEY" mock)
wrong=$(ask sk-wrong-0123456789abcdef mock)
echo "right key: $right; wrong key: $wrong, $(head -c 120 "$folder/answer")"
unknown=$(ask "$LITELLM_MASTER_KEY" nothing)
echo "unknown model: $unknown, $(head -c 160 "$folder/answer")"
[ "$right" = 200 ]
[ "$wrong" = 400 ] && [ "$unknown" = 400 ]
