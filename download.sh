#!/bin/sh
# download.sh - download Meta's Llama 2 weights and check them against Meta's checksums.
#
# This script is under the MIT license of this project. The weights are under Meta's own license. Meta emails a signed link to
# everyone who accepts that license.
#
#   ./download.sh                                                 asks for the link and the models
#   ./download.sh --url LINK --models 7B,13B-chat --dir weights   asks nothing
#   ./download.sh --help                                          all options and environment variables
#
# Each file is downloaded as NAME.part and renamed to NAME once its checksum is right. Complete files are not downloaded
# again, and interrupted downloads resume. The link is a secret that is valid for a limited number of downloads: the script
# never prints the link, and makes no unnecessary requests.
#
# Written in POSIX sh, for dash, busybox and the bash 3.2 of macOS.

set +x # a trace (sh -x) would print the link
set -u
export LC_ALL=C

known="7B, 13B, 70B, 7B-chat, 13B-chat, 70B-chat"

usage() {
  cat <<END
Usage: download.sh [--url LINK] [--models LIST] [--dir FOLDER]

Downloads Meta's Llama 2 weights and checks them. Asks for the link and the models unless they are given as options.
After a failure, or Ctrl-C, run it again: complete files are kept, and interrupted downloads resume.

  --url LINK      the link from Meta's email, in single quotes: 'https://...*?Policy=...&Signature=...&Key-Pair-Id=...'
                  (without this option the script asks for it, which is safer: a shell keeps a history of commands)
  --models LIST   comma-separated names out of: $known; or: all
  --dir FOLDER    folder for the files; default: the current folder
  -h, --help      show this text

Environment variables, used if the option is not given:
  PRESIGNED_URL, MODEL_SIZE, TARGET_FOLDER   as --url, --models, --dir
  DOWNLOAD_RETRY_WAIT   seconds to wait after the first failed attempt, twice as many after the second, ...; default: 2
  DOWNLOAD_TIMEOUT      seconds without data after which a connection counts as broken; default: 60
  https_proxy           the address of a proxy, if the network needs one; settings in .curlrc and .wgetrc are not read

Needs curl or GNU wget 1; md5sum, md5 or openssl. The weights are under Meta's license, not under this project's.
END
}

say() { printf 'download.sh: %s\n' "$*" >&2; }

die() {
  say "$*"
  exit 1
}

interrupted() { # EXIT_STATUS
  if [ -t 2 ]; then echo >&2; fi # ends the line of the progress bar
  say "interrupted; what came so far is kept: run the same command again to resume"
  exit "$1"
}

ask() { # QUESTION: read a line of stdin into $answer; return 1 at the end of stdin
  if [ -t 0 ]; then printf '%s ' "$1" >&2; fi
  answer=
  read -r answer || [ -n "$answer" ] || return 1
  answer=$(printf '%s' "$answer" | tr -d '\r')
}

# ---- Checks of the options and the tools, before the first request ----

check_link() { # split $url at its * into $before and $after; error messages never quote the link
  while :; do # a link copied from the source of an HTML email has &amp; in place of &
    case $url in *'&amp;'*) url="${url%%&amp;*}&${url#*&amp;}" ;; *) break ;; esac
  done
  case $url in
    http://* | https://*) ;;
    *) die "the link does not begin with https://: copy it again from Meta's email" ;;
  esac
  case $url in
    *[[:space:]\"\\]*) die "the link contains a blank, a quote or a backslash: copy it again from Meta's email" ;;
    *\**) before=${url%%\**} after=${url#*\*} ;;
    *) die "the link has no '*', which stands for the file's name: copy the whole link from Meta's email, unchanged" ;;
  esac
  case $url in
    https://download*.llamameta.net/* | *[?\&]Policy=*) ;;
    *) return ;; # a mirror's link may have any parts
  esac
  for part in Policy Signature Key-Pair-Id; do
    case $url in
      *[?\&]"$part"=[!\&]*) ;;
      *) die "the link is cut off ('$part=...' is missing): copy the whole link from Meta's email; in a command, put it" \
        "in single quotes, because a shell ends it at the first '&'" ;;
    esac
  done
}

expand_home() { # replace a leading ~ of $folder by the home folder, since a shell leaves it in quotes and after =
  case $folder in
    \~ | \~/*) folder=${HOME:?"is not set: give --dir an absolute path"}${folder#\~} ;;
    \~*) die "the folder '$folder' begins with ~, which stands for your own home folder only: give an absolute path," \
      "or './$folder' for a folder of that name" ;;
  esac
}

check_models() { # replace $models by names separated by blanks
  case $models in
    *[!A-Za-z0-9,\ -]*) die "the list of models contains more than names: give some of $known" ;; # never quoted
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

md5_with() { # TOOL: print the MD5 checksum of stdin
  case $1 in
    md5sum) md5sum ;;
    md5) md5 -q ;; # macOS, BSD
    openssl) openssl dgst -md5 ;;
  esac 2>/dev/null | grep -oE '[0-9a-f]{32}'
}

find_tools() { # set $client and $hasher to installed programs
  if command -v curl >/dev/null; then
    client=curl
  elif wget --version 2>/dev/null | grep -q '^GNU Wget 1\.'; then # wget2 and busybox's wget have other options
    client=wget
  else
    die "neither curl nor GNU wget 1 is installed: install curl"
  fi
  for hasher in md5sum md5 openssl none; do # each is tested, because some builds of openssl lack md5
    if [ "$(printf '' | md5_with "$hasher")" = d41d8cd98f00b204e9800998ecf8427e ]; then break; fi
  done
  [ "$hasher" != none ] || die "no md5sum, md5 or openssl is installed to check the files: install one of them"
}

make_folder() { # FOLDER
  if ! mkdir -p -- "$1" 2>/dev/null || ! [ -w "$1" ]; then
    die "cannot write to the folder '$1': change its permissions or give another one with --dir"
  fi
}

# ---- Requests ----

# Download the missing rest of PATH into FILE. Sets $code to the HTTP status and $type to the content type, if the server sent
# them, and $status to the exit status of the client. The client reads the link from stdin, because ps shows command lines to
# everyone. The user's .curlrc and .wgetrc are ignored, because they may turn on logs that contain the link.
request() { # PATH FILE
  if [ "$client" = curl ]; then
    if [ -t 2 ]; then progress=--progress-bar; else progress=--silent; fi
    code=$(printf 'url = "%s"\n' "$before$1$after" |
      curl -q --config - --output "$2" --continue-at - --fail --location --globoff "$progress" \
        --connect-timeout "$timeout" --speed-limit 1 --speed-time "$timeout" --write-out '%{http_code} %{content_type}')
    status=$? type=${code#* } code=${code%% *}
  else
    if [ -t 2 ]; then progress=--show-progress; else progress=; fi
    headers=$(printf '%s\n' "$before$1$after" |
      wget --no-config --input-file=- --output-document="$2" --continue --tries=1 --timeout="$timeout" \
        --quiet ${progress:+"$progress"} --progress=bar:force --server-response --output-file=-)
    status=$?
    code=$(printf '%s\n' "$headers" | awk '$1 ~ /^HTTP\// { code = $2 } END { print code }')
    type=$(printf '%s\n' "$headers" | awk 'tolower($1) == "content-type:" { type = $2 } END { print type }')
  fi
}

is_page() { # FILE: return 0 if it is a web page
  [ -s "$1" ] || return 1
  case $(head -c 512 "$1" | tr -cd '<!A-Za-z' | tr '[:upper:]' '[:lower:]') in
    '<!'* | '<html'* | '<head'* | '<body'* | '<xml'* | '<script'*) return 0 ;;
  esac
  return 1
}

size() { if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi; }

# Download PATH into FILE with as many requests as needed. Exits with an error after five requests in a row without new data.
fetch() { # PATH FILE
  if is_page "$2"; then rm -f "$2"; fi
  tries=0 largest=0
  while :; do
    request "$1" "$2"
    got_page=
    case $code-$type in 200-text/html*) got_page=yes ;; esac # FILE then has no new data, and is kept
    if is_page "$2"; then rm -f "$2" && got_page=yes; fi
    if [ -n "$got_page" ]; then
      die "$1: the server sent a web page instead: a proxy or login page answers, or the link is not the one from Meta's email"
    fi
    if ! [ -s "$2" ]; then rm -f "$2"; fi # wget creates the file before its request
    case $client-$status in
      curl-23 | wget-1 | wget-3)
        free=$(df -Pk . | awk 'NR == 2 { print $4 }')
        die "$1: cannot write '$folder/$2' ($free KB free): free some space and run again to resume"
        ;;
      curl-33) rm -f "$2" ;; # the server cannot resume: start again; wget instead skips the part that FILE has
    esac
    case $code in
      401 | 403 | 410) die "$1: refused ($code): the link has expired (after 24 hours or a number of downloads)" \
        "or is not for this model: get a new one from Meta and run again; downloaded data is kept" ;;
      404) die "$1: the server does not have it (404): check that the link is unchanged and is for this model" ;;
      416) return ;; # FILE is complete, or too long, which the checksum will show
      200 | 206) if [ "$status" -eq 0 ]; then return; fi ;;
      '' | 000 | 408 | 429 | 5??) ;;
      *) die "$1: the server answers $code: check that the link is unchanged" ;;
    esac
    if [ "$(size "$2")" -gt "$largest" ]; then largest=$(size "$2") tries=0; fi
    tries=$((tries + 1))
    if [ "$tries" -eq 5 ]; then
      case ${code:-000} in 000) advice=", and set https_proxy if it needs a proxy (see --help)," ;; *) advice= ;; esac
      die "$1: five tries brought nothing more (HTTP status ${code:-000}, $client exit status $status):" \
        "check the network$advice and run again to resume"
    fi
    sleep $((tries * retry_wait))
  done
}

# ---- Files ----

sum_in() { # CHECKLIST NAME: print the checksum of NAME in the checklist
  awk -v name="$2" 'length($1) == 32 && $1 !~ /[^0-9a-f]/ && ($2 == name || $2 == "*" name) { print $1; exit }' "$1"
}

lists() { # CHECKLIST NAME...: return 0 if the checklist has a checksum for each name
  list=$1
  shift
  for name; do
    [ -n "$(sum_in "$list" "$name")" ] || return 1
  done
}

is_right() { # FILE SUM: return 0 if the file has this checksum
  if [ -t 2 ] && [ -s "$1" ]; then say "$1: checking"; fi # large files take a while
  [ -s "$1" ] && [ "$(md5_with "$hasher" <"$1")" = "$2" ]
}

get_unchecked() { # PATH FILE [NAME...]: download a file without a checksum; with NAMEs, it must be a checklist of them
  path=$1 file=$2
  shift 2
  if [ -s "$file" ] && lists "$file" "$@"; then
    say "$file: already downloaded"
    return
  fi
  say "$file: downloading"
  rm -f "$file.part" # without a checksum, a resumed download could not be checked
  fetch "$path" "$file.part"
  if ! [ -s "$file.part" ] || ! lists "$file.part" "$@"; then
    rm -f "$file.part"
    die "$path: the downloaded file is empty or without the checksums: run again, and get a new link if that does not help"
  fi
  mv -f "$file.part" "$file" || exit 1
}

get_checked() { # PATH CHECKLIST: download a file and check its checksum
  sum=$(sum_in "$2" "${1##*/}")
  if is_right "$1" "$sum"; then
    say "$1: already complete"
    return
  fi
  # A file with the final name and a wrong checksum comes from an interrupted run of another downloader: resume it
  if [ -f "$1" ] && ! [ -e "$1.part" ]; then mv -f "$1" "$1.part"; fi
  say "$1: downloading from byte $(size "$1.part")"
  for round in first second; do
    fetch "$1" "$1.part"
    if is_right "$1.part" "$sum"; then
      mv -f "$1.part" "$1" || exit 1
      return
    fi
    rm -f "$1.part"
    if [ "$round" = first ]; then say "$1: the checksum is wrong: downloading it once more, from the start"; fi
  done
  rm -f "$2" # the checklist may be wrong: the next run downloads it again
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
  unset PRESIGNED_URL # so that the programs started from here do not inherit the link
  case $timeout/$retry_wait in
    *[!0-9/]* | 0?*/* | */0?* | /* | */) die "DOWNLOAD_TIMEOUT and DOWNLOAD_RETRY_WAIT must be whole seconds" ;;
  esac
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
  expand_home
  make_folder "$folder"
  CDPATH='' cd -- "$folder" || exit 1
  folder=$(pwd)

  # In the folder of this project, LICENSE is the project's own license, and is kept
  license=LICENSE
  if [ -s LICENSE ] && ! grep -qi 'llama 2 community license' LICENSE; then license=LICENSE-llama-2; fi
  get_unchecked LICENSE "$license"
  get_unchecked USE_POLICY.md USE_POLICY.md
  get_unchecked tokenizer_checklist.chk tokenizer_checklist.chk tokenizer.model
  get_checked tokenizer.model tokenizer_checklist.chk
  for model in $models; do get_model "$model"; done
  say "all files are complete, in '$folder'. They are under Meta's license: see $license and USE_POLICY.md there"
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
    *) die "every value needs its option, as --url LINK: see --help" ;; # not quoted: it may be the link
  esac
done
# Start the script again with the link in the environment, because ps shows arguments to everyone during the whole download
if [ -n "$link_in_arguments" ] && [ -f "$0" ]; then
  export PRESIGNED_URL MODEL_SIZE="${MODEL_SIZE-}" TARGET_FOLDER="${TARGET_FOLDER-}"
  exec sh "$0"
fi
main
