#!/bin/sh
# download.sh - fetches Meta's Llama 2 weights and checks them against Meta's checksums.
#
# The script is this project's own (MIT, like the rest of the code). The weights are not: Meta gives them under its
# own licence, and mails a signed link to those who accept it.
#
#   ./download.sh                                                 asks for the link and the models
#   ./download.sh --url LINK --models 7B,13B-chat --dir weights   asks nothing
#   ./download.sh --help                                          all options and environment variables
#
# A file is fetched as NAME.part, checked, and only then gets its name. What is whole is not fetched again; what was
# cut off goes on where it stopped. The link is a secret and wears out with use: it is never shown, and no request is
# made without need.
#
# POSIX sh, to run alike under dash, busybox and the bash 3.2 of macOS.

set +x # a trace (sh -x) would show the link
set -u
export LC_ALL=C

known="7B, 13B, 70B, 7B-chat, 13B-chat, 70B-chat"

usage() {
  cat <<END
Usage: download.sh [--url LINK] [--models LIST] [--dir FOLDER]

Downloads Meta's Llama 2 weights and checks them. Asks for the link and the models where they are not given.
After any failure, or Ctrl-C, run it again: it keeps what is whole and goes on where it stopped.

  --url LINK      the link from Meta's email, https://...*?Policy=... (to answer the question is safer: what is typed
                  as a command stays in the history of the shell)
  --models LIST   comma separated, out of: $known; or: all
  --dir FOLDER    where the files go; the current folder if not given
  -h, --help      this text

Environment variables, used where the option is not given:
  PRESIGNED_URL, MODEL_SIZE, TARGET_FOLDER   as --url, --models, --dir
  DOWNLOAD_RETRY_WAIT   seconds to wait after the first failed try, twice that after the second, ... (2)
  DOWNLOAD_TIMEOUT      seconds without data after which a connection counts as broken (60)

Needs curl or GNU wget 1; md5sum, md5 or openssl. The weights are under Meta's licence, not under this project's.
END
}

say() { printf 'download.sh: %s\n' "$*" >&2; }

die() {
  say "$*"
  exit 1
}

interrupted() { # EXIT_STATUS
  if [ -t 2 ]; then echo >&2; fi # off the line of the progress bar
  say "interrupted; what came so far is kept: run the same again and it goes on from there"
  exit "$1"
}

ask() { # QUESTION: puts a line of stdin into $answer; false where there is none
  if [ -t 0 ]; then printf '%s ' "$1" >&2; fi
  answer=
  read -r answer || [ -n "$answer" ] || return 1
  answer=$(printf '%s' "$answer" | tr -d '\r')
}

# ---- What is asked for, and with which tools: checked before the first request ----

check_link() { # splits $url at its * into $before and $after; says nothing of its text
  case $url in
    http://* | https://*) ;;
    *) die "the link does not begin with https://: copy it again from Meta's email" ;;
  esac
  case $url in
    *[[:space:]\"\\]*) die "the link has a blank, a quote or a backslash, as no link does: copy it again" ;;
    *\**) before=${url%%\**} after=${url#*\*} ;;
    *) die "the link has no '*', where the file's name goes: copy its text from Meta's email, unchanged" ;;
  esac
}

check_models() { # turns $models into words
  case $models in
    *[!A-Za-z0-9,\ -]*) die "the list of models has more than names: give some of $known" ;; # or the link: not shown
  esac
  models=$(printf '%s' "$models" | tr ',' ' ')
  model=
  for model in $models; do
    case $model in
      7B | 13B | 70B | 7B-chat | 13B-chat | 70B-chat | all) ;;
      *) die "unknown model '$model': give some of $known" ;;
    esac
  done
  [ -n "$model" ] || die "the list of models is empty: give some of $known"
  case " $models " in *" all "*) models=$(printf '%s' "$known" | tr ',' ' ') ;; esac
}

md5_with() { # TOOL: prints the md5 sum of stdin
  case $1 in
    md5sum) md5sum ;;
    md5) md5 -q ;; # macOS, BSD
    openssl) openssl dgst -md5 ;;
  esac 2>/dev/null | grep -oE '[0-9a-f]{32}'
}

find_tools() { # sets $client and $hasher
  if command -v curl >/dev/null; then
    client=curl
  elif wget --version 2>/dev/null | grep -q '^GNU Wget 1\.'; then # those of wget2 and busybox work otherwise
    client=wget
  else
    die "neither curl nor GNU wget 1 is there: install curl"
  fi
  for hasher in md5sum md5 openssl none; do # tried out: an openssl may be without md5
    if [ "$(printf '' | md5_with "$hasher")" = d41d8cd98f00b204e9800998ecf8427e ]; then break; fi
  done
  [ "$hasher" != none ] || die "no md5sum, md5 or openssl to check the files with: install one of them"
}

make_folder() { # FOLDER
  if ! mkdir -p -- "$1" 2>/dev/null || ! [ -w "$1" ]; then
    die "cannot write to the folder '$1': change its permissions or give another one with --dir"
  fi
}

# ---- Requests ----

# Adds to FILE what it lacks of PATH. Sets $code to the HTTP status and $type to the content type, if they came, and $status
# to the exit status of the client. The link goes in by stdin, for anyone can read a command line with ps. The user's .curlrc and .wgetrc are left
# out, for they may ask for logs that show it.
request() { # PATH FILE
  if [ "$client" = curl ]; then
    if [ -t 2 ]; then shown=--progress-bar; else shown=--silent; fi
    code=$(printf 'url = "%s"\n' "$before$1$after" |
      curl -q --config - --output "$2" --continue-at - --fail --location --globoff "$shown" \
        --connect-timeout "$timeout" --speed-limit 1 --speed-time "$timeout" --write-out '%{http_code} %{content_type}')
    status=$? type=${code#* } code=${code%% *}
  else
    if [ -t 2 ]; then shown=--show-progress; else shown=; fi
    headers=$(printf '%s\n' "$before$1$after" |
      wget --no-config --input-file=- --output-document="$2" --continue --tries=1 --timeout="$timeout" \
        --quiet ${shown:+"$shown"} --progress=bar:force --server-response --output-file=-)
    status=$?
    code=$(printf '%s\n' "$headers" | awk '$1 ~ /^HTTP\// { code = $2 } END { print code }')
    type=$(printf '%s\n' "$headers" | awk 'tolower($1) == "content-type:" { type = $2 } END { print type }')
  fi
}

is_page() { # FILE: is it a web page?
  [ -s "$1" ] || return 1
  case $(head -c 512 "$1" | tr -cd '<!A-Za-z' | tr '[:upper:]' '[:lower:]') in
    '<!'* | '<html'* | '<head'* | '<body'* | '<xml'* | '<script'*) return 0 ;;
  esac
  return 1
}

size() { if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }

# Brings FILE to all that the server has of PATH, over as many requests as that takes, but gives up after five in a
# row that brought nothing more.
fetch() { # PATH FILE
  if is_page "$2"; then rm -f "$2"; fi
  tries=0 most=0
  while :; do
    request "$1" "$2"
    page=
    case $code-$type in 200-text/html*) page=yes ;; esac # and what was here before stays
    if is_page "$2"; then rm -f "$2" && page=yes; fi
    if [ -n "$page" ]; then
      die "$1: a web page came in its place: a proxy or login page answers, or this is not the link from Meta's email"
    fi
    if ! [ -s "$2" ]; then rm -f "$2"; fi # wget makes it before it asks
    case $client-$status in
      curl-23 | wget-1 | wget-3)
        free=$(df -Pk . | awk 'NR == 2 { print $4 }')
        die "$1: cannot write '$folder/$2' ($free KB free): make room and run again, it goes on where it stopped"
        ;;
      curl-33) rm -f "$2" ;; # the server sends whole files only; wget skips what it has
    esac
    case $code in
      401 | 403 | 410) die "$1: refused ($code): the link has expired (it lasts 24 hours and a number of downloads)" \
        "or is not for this model: get a new one from Meta and run again, what is here is kept" ;;
      404) die "$1: the server does not have it (404): check that the link is unchanged, and for this model" ;;
      416) return ;; # nothing is lacking; if there is too much, the checksum will be wrong
      200 | 206) if [ "$status" -eq 0 ]; then return; fi ;;
      '' | 000 | 408 | 429 | 5??) ;;
      *) die "$1: the server answers $code: check that the link is unchanged" ;;
    esac
    if [ "$(size "$2")" -gt "$most" ]; then most=$(size "$2") tries=0; fi
    tries=$((tries + 1))
    if [ "$tries" -eq 5 ]; then
      die "$1: five tries brought nothing more (HTTP status ${code:-000}, $client exit status $status):" \
        "check the network and run again, it goes on where it stopped"
    fi
    sleep $((tries * retry_wait))
  done
}

# ---- Files ----

sum_in() { # CHECKLIST NAME: prints the md5 sum that it gives for NAME
  awk -v name="$2" 'length($1) == 32 && $1 !~ /[^0-9a-f]/ && ($2 == name || $2 == "*" name) { print $1; exit }' "$1"
}

lists() { # CHECKLIST NAME...: has it a sum for each?
  list=$1
  shift
  for name; do
    [ -n "$(sum_in "$list" "$name")" ] || return 1
  done
}

is_right() { # FILE SUM
  if [ -t 2 ] && [ -s "$1" ]; then say "$1: checking"; fi # a large one takes a while
  [ -s "$1" ] && [ "$(md5_with "$hasher" <"$1")" = "$2" ]
}

get_unchecked() { # PATH FILE [NAME...]: there is no checksum for it; if NAMEs are given, it is a checklist for them
  path=$1 file=$2
  shift 2
  if [ -s "$file" ] && lists "$file" "$@"; then
    say "$file: already there"
    return
  fi
  say "$file: fetching"
  rm -f "$file.part" # nothing would tell if a continued one is right
  fetch "$path" "$file.part"
  if ! [ -s "$file.part" ] || ! lists "$file.part" "$@"; then
    rm -f "$file.part"
    die "$path: what came is empty or without the checksums: run again, and get a new link if that does not help"
  fi
  mv -f "$file.part" "$file" || exit 1
}

get_checked() { # PATH CHECKLIST
  sum=$(sum_in "$2" "${1##*/}")
  if is_right "$1" "$sum"; then
    say "$1: already whole"
    return
  fi
  # It bears the name without being right: some other downloader was interrupted
  if [ -f "$1" ] && ! [ -e "$1.part" ]; then mv -f "$1" "$1.part"; fi
  say "$1: fetching from byte $(size "$1.part")"
  for round in first second; do
    fetch "$1" "$1.part"
    if is_right "$1.part" "$sum"; then
      mv -f "$1.part" "$1" || exit 1
      return
    fi
    rm -f "$1.part"
    if [ "$round" = first ]; then say "$1: the checksum is wrong: fetching it once more, from the start"; fi
  done
  rm -f "$2" # it may be what is wrong: the next run fetches it too
  die "$1: the checksum is wrong again: run again later, and get a new link if that does not help"
}

get_model() { # MODEL
  model_folder=llama-2-$(printf '%s' "$1" | tr B b)
  case $1 in
    7B*) shards="00" ;;
    13B*) shards="00 01" ;;
    *) shards="00 01 02 03 04 05 06 07" ;;
  esac
  set -- params.json
  for shard in $shards; do set -- "$@" "consolidated.$shard.pth"; done

  make_folder "$model_folder"
  get_unchecked "$model_folder/checklist.chk" "$model_folder/checklist.chk" "$@"
  for name; do
    get_checked "$model_folder/$name" "$model_folder/checklist.chk"
  done
}

main() {
  url=${PRESIGNED_URL-} models=${MODEL_SIZE-} folder=${TARGET_FOLDER:-.}
  timeout=${DOWNLOAD_TIMEOUT:-60} retry_wait=${DOWNLOAD_RETRY_WAIT:-2}
  unset PRESIGNED_URL # what runs from here need not have it
  case $timeout/$retry_wait in *[!0-9/]* | 0?*/* | */0?* | /* | */) die "DOWNLOAD_TIMEOUT and DOWNLOAD_RETRY_WAIT must be whole seconds" ;; esac
  trap 'interrupted 129' HUP
  trap 'interrupted 130' INT
  trap 'interrupted 143' TERM

  find_tools
  if [ -z "$url" ]; then
    ask "The link from Meta's email:" || die "no link: give it with --url or PRESIGNED_URL, or answer the question"
    url=$answer
  fi
  check_link
  if [ -z "$models" ]; then
    ask "The models, comma separated, out of $known, or Enter for all:" ||
      die "no models: give some of $known with --models, or all"
    models=${answer:-all}
  fi
  check_models
  make_folder "$folder"
  CDPATH='' cd -- "$folder" || exit 1
  folder=$(pwd)

  # In this project's own folder LICENSE is the project's: that one stays
  licence=LICENSE
  if [ -s LICENSE ] && ! grep -qi 'llama 2 community license' LICENSE; then licence=LICENSE-llama-2; fi
  get_unchecked LICENSE "$licence"
  get_unchecked USE_POLICY.md USE_POLICY.md
  get_unchecked tokenizer_checklist.chk tokenizer_checklist.chk tokenizer.model
  get_checked tokenizer.model tokenizer_checklist.chk
  for model in $models; do get_model "$model"; done
  say "all files are whole, in '$folder'. They are under Meta's licence: see $licence and USE_POLICY.md there"
}

link_in_arguments=
while [ $# -gt 0 ]; do
  option=${1%%=*}
  case $1 in
    *=*) value=${1#*=} ;;
    --url | --models | --dir)
      [ $# -ge 2 ] || die "$1 needs a value: see --help"
      value=$2
      shift
      ;;
  esac
  shift
  case $option in
    --url) PRESIGNED_URL=$value link_in_arguments=yes ;;
    --models) MODEL_SIZE=$value ;;
    --dir) TARGET_FOLDER=$value ;;
    -h | --help)
      usage
      exit
      ;;
    -*) die "unknown option '$option': see --help" ;;
    *) die "every value needs its option, as --url LINK: see --help" ;; # not shown: it may be the link
  esac
done
# Start anew with all of it in the environment: ps shows arguments to everyone, as long as the download takes
if [ -n "$link_in_arguments" ] && [ -f "$0" ]; then
  export PRESIGNED_URL MODEL_SIZE="${MODEL_SIZE-}" TARGET_FOLDER="${TARGET_FOLDER-}"
  exec sh "$0"
fi
main
