#!/bin/sh
# Gets what the examples and tests need and the repository does not hold.
set -eu
cd "$(dirname "$0")/.."

usage() {
    cat <<'EOF'
usage: tools/fetch_data.sh [data|stb|font|all]

  data   the four Fashion-MNIST files, uncompressed and verified, in data/
  stb    the headers stb_image_write.h and stb_truetype.h
  font   DejaVuSans.ttf
  all    all of them (default)

What the system already holds is used. Otherwise headers and font are
installed (as root) or unpacked from their Debian packages into third_party/stb
and data/; without Debian's packages everything comes from its upstream site.

Environment: FASHION_DIR, STB_DIR and FONT_FILE say where to look first
(/usr/share/datasets/fashion-mnist, /usr/include/stb and
/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf).
EOF
}

fashion_dir=${FASHION_DIR:-/usr/share/datasets/fashion-mnist}
fashion_url=http://fashion-mnist.s3-website.eu-central-1.amazonaws.com
stb_dir=${STB_DIR:-/usr/include/stb}
stb_url=https://raw.githubusercontent.com/nothings/stb/master
font_file=${FONT_FILE:-/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf}
font_url=https://github.com/dejavu-fonts/dejavu-fonts/releases/download/version_2_37/dejavu-fonts-ttf-2.37.tar.bz2

say() { echo "fetch_data: $*"; }
die() { echo "fetch_data: $*" >&2; exit 1; }

# fail WHAT: ends the run with one line, which holds the last error message
fail() { die "cannot get $1 ($(tail -n 1 "$tmp/log"))"; }

sha256() {
    if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi |
        cut -d ' ' -f 1
}

download() { # URL FILE
    curl -fsSL --connect-timeout 20 --retry 2 -o "$2" "$1" 2>>"$tmp/log"
}

apt_get() {
    (cd "$tmp" && DEBIAN_FRONTEND=noninteractive apt-get -qq -y \
        -o APT::Sandbox::User=root -o DPkg::Lock::Timeout=120 -o Acquire::Retries=2 \
        ${lists:+"-oDir::State::Lists=$lists"} "$@") </dev/null >>"$tmp/log" 2>&1
}

# Tries once more with fresh package lists, which are private ones without root.
apt_get_fresh() {
    apt_get "$@" && return
    [ -z "$fresh" ] || return 1
    fresh=1
    is_root || { lists=$tmp/lists && mkdir -p "$lists/partial"; }
    apt_get update && apt_get "$@"
}

is_root() { [ "$(id -u)" = 0 ]; }

install_package() { # as root only
    is_root && command -v apt-get >/dev/null || return 1
    say "installing the Debian package $1"
    apt_get_fresh install --no-install-recommends "$1"
}

unpack_package() { # into $tmp/NAME; needs no root
    [ ! -d "$tmp/$1" ] || return 0
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 1
    say "unpacking the Debian package $1"
    apt_get_fresh download "$1" && dpkg-deb -x "$tmp/$1"_*.deb "$tmp/$1" 2>>"$tmp/log"
}

# The three sources of a data file set $gz to the compressed file.
installed() { gz=$fashion_dir/$1.gz; }
package() {
    unpack_package dataset-fashion-mnist &&
        gz=$tmp/dataset-fashion-mnist/usr/share/datasets/fashion-mnist/$1.gz
}
upstream() {
    say "downloading $1 from upstream"
    gz=$tmp/$1.gz && download "$fashion_url/$1.gz" "$gz"
}

data_file() { # NAME SHA256
    if [ -e "data/$1" ]; then
        [ "$(sha256 "data/$1")" != "$2" ] || return 0
        say "data/$1 is damaged, getting it anew"
    fi
    for source in installed package upstream; do
        if "$source" "$1" && gzip -dc "$gz" >"$tmp/$1" 2>>"$tmp/log"; then
            if [ "$(sha256 "$tmp/$1")" = "$2" ]; then
                mv -f "$tmp/$1" "data/$1"
                return
            fi
            echo "$1: wrong checksum ($source)" >>"$tmp/log"
        fi
    done
    fail "data/$1"
}

get_data() {
    data_file train-images-idx3-ubyte c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888
    data_file train-labels-idx1-ubyte bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9
    data_file t10k-images-idx3-ubyte 5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b
    data_file t10k-labels-idx1-ubyte 0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34
    say "Fashion-MNIST is in data/"
}

has_stb() { [ -s "$1/stb_image_write.h" ] && [ -s "$1/stb_truetype.h" ]; }

get_stb() {
    if has_stb "$stb_dir" || { install_package libstb-dev && has_stb "$stb_dir"; }; then
        say "the stb headers are in $stb_dir"
        return
    fi
    if ! has_stb third_party/stb; then
        mkdir -p third_party/stb
        from=$tmp/libstb-dev/usr/include/stb
        for header in stb_image_write.h stb_truetype.h; do
            if unpack_package libstb-dev && [ -s "$from/$header" ]; then
                cp "$from/$header" "$tmp/$header"
            else
                say "downloading $header from upstream"
                download "$stb_url/$header" "$tmp/$header" || fail "$header"
            fi
            mv -f "$tmp/$header" "third_party/stb/$header"
        done
    fi
    say "the stb headers are in third_party/stb"
}

get_font() {
    if [ -s "$font_file" ] || { install_package fonts-dejavu-core && [ -s "$font_file" ]; }; then
        say "the font is $font_file"
        return
    fi
    if [ ! -s data/DejaVuSans.ttf ]; then
        font=$tmp/fonts-dejavu-core/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf
        if ! unpack_package fonts-dejavu-core || [ ! -s "$font" ]; then
            say "downloading the font from upstream"
            font=$tmp/dejavu-fonts-ttf-2.37/ttf/DejaVuSans.ttf
            if ! download "$font_url" "$tmp/font.tar.bz2" ||
                ! tar -xjf "$tmp/font.tar.bz2" -C "$tmp" 2>>"$tmp/log" || [ ! -s "$font" ]; then
                fail DejaVuSans.ttf
            fi
        fi
        mv -f "$font" data/DejaVuSans.ttf
    fi
    say "the font is data/DejaVuSans.ttf"
}

what=${1:-all}
case $what in
    data | stb | font | all) ;;
    -h | --help) usage; exit ;;
    *) usage >&2; exit 2 ;;
esac

# Everything is made in a temporary folder beside its place and then moved, so
# that an interrupted run leaves no damaged file.
fresh='' lists=''
{ mkdir -p data && tmp=$PWD/$(mktemp -d data/.fetch.XXXXXX); } 2>/dev/null ||
    die "cannot write to $PWD/data"
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' HUP INT TERM
: >"$tmp/log"

case $what in all | data) get_data ;; esac
case $what in all | stb) get_stb ;; esac
case $what in all | font) get_font ;; esac
