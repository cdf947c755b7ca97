# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# What an image does on a filesystem that is mounted with DAX for some files or for none.

# remount ext4|xfs OPTION
remount() {
    umount "$DAX"
    mount -t "$1" -o "$2" /dev/pmem0 "$DAX"
}

# said_persistence IMAGE WORDS: what `info` must say.
said_persistence() {
    pcow-img info "$1" >/tmp/info
    cat /tmp/info
    grep -q "^persistence: *$2" /tmp/info
}

# is_refused IMAGE PATTERN [ARGUMENT]...: the backend serves it no more than a moment, and its message matches.
is_refused() {
    refused=$1
    pattern=$2
    shift 2
    if pcow-backend --socket /tmp/refused.sock --image "$refused" "$@" >/tmp/refused.log 2>&1; then
        fail "the backend serves $refused"
    fi
    cat /tmp/refused.log
    grep "$pattern" /tmp/refused.log
}

page_cache_backend() {
    exec pcow-backend --page-cache "$@"
}

# takeover_is_refused IMAGE PATTERN: a backend that will not serve the image does not end the one that does.
takeover_is_refused() {
    backends=
    start_backend 0 "$1"
    is_refused "$1" "$2" --takeover
    # One that was ended would be a zombie, since nobody has waited for it.
    grep '^State:.*sleeping' "/proc/${backends# }/status"
    end_backends
}

# Without DAX for the whole filesystem: the image is served only if its user says that it is to be in the page cache.
image_leaves_dax() {
    remount "$1" dax=never
    said_persistence "$DAX/moved.pcow" 'page cache'
    grep '^not on DAX: .*\.map is not served with DAX.*dax=always' /tmp/info
    refusal='\.map is not served with DAX.*dax=always.*--page-cache'
    is_refused "$DAX/moved.pcow" "$refusal"
    backend_program=page_cache_backend
    persistence='page cache: a crash of a process loses nothing'
    guest "$DAX/moved.pcow" write one
    grep 'WARN.*this image was on DAX until now' /tmp/backend0.log
    grep 'WARN.*the image is not served with DAX, although its device can do that' /tmp/backend0.log
    takeover_is_refused "$DAX/moved.pcow" "$refusal"
    backend_program=pcow-backend
}

# file_is_not_on_dax ext4|xfs SUFFIX OTHER: one file of an image has lost its flag, as a copy has that was made elsewhere.
file_is_not_on_dax() {
    image=$DAX/flagged/mixed.pcow
    pcow-img create "$image" 64M
    said_persistence "$image" DAX
    cp "$image"/*."$2" "$DAX/copy"
    cat "$DAX/copy" >"$DAX/plain"
    mv "$DAX/plain" "$image"/*."$2"
    rm "$DAX/copy"
    remount "$1" dax=inode
    said_persistence "$image" 'not known'
    problem="\\.$2 is not served with DAX.*\\.$3 is on DAX.*chattr +x"
    grep "^problem: .*$problem" /tmp/info
    is_refused "$image" "$problem"
    # What the message says to do.
    name=$(basename "$image"/*."$2")
    cp "$image/$name" "$image/again"
    mv "$image/again" "$image/$name"
    said_persistence "$image" DAX
    rm -r "$image"
}

one_file_is_not_on_dax() {
    remount "$1" dax=inode
    mkdir "$DAX/flagged"
    chattr +x "$DAX/flagged"
    file_is_not_on_dax "$1" data map
    file_is_not_on_dax "$1" map data
}

domains() {
    pcow-img create "$DAX/moved.pcow" 64M
    image_leaves_dax "$1"
    one_file_is_not_on_dax "$1"
    remount "$1" dax=always
    said_persistence "$DAX/moved.pcow" DAX
    rm -r "$DAX/moved.pcow" "$DAX/flagged"
}
