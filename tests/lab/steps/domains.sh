# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# What an image does on a filesystem that is mounted with DAX for some files or for none.

# remount ext4|xfs OPTION
remount() {
    umount "$DAX"
    mount -t "$1" -o "$2" /dev/pmem0 "$DAX"
}

# persistence IMAGE WORDS: what `info` must say.
persistence() {
    pcow-img info "$1" >/tmp/info
    cat /tmp/info
    grep -q "^persistence: *$2" /tmp/info
}

# Without DAX for the whole filesystem: the image is in the page cache, and that is said.
image_leaves_dax() {
    remount "$1" dax=never
    persistence "$DAX/moved.pcow" 'page cache'
    grep '^not on DAX: .*\.map is not served with DAX.*dax=always' /tmp/info
    backends=
    start_backend 0 "$DAX/moved.pcow"
    # shellcheck disable=SC2086 # one process
    kill -TERM $backends
    # shellcheck disable=SC2086
    wait $backends
    grep 'WARN.*this image was on DAX until now' /tmp/backend0.log
    grep 'WARN.*the image is not served with DAX, although its device can do that' /tmp/backend0.log
}

# One file that lost its flag, as a copy does that was made elsewhere.
one_file_is_not_on_dax() {
    remount "$1" dax=inode
    mkdir "$DAX/flagged"
    chattr +x "$DAX/flagged"
    image=$DAX/flagged/mixed.pcow
    pcow-img create "$image" 64M
    persistence "$image" DAX
    cp "$image"/*.data "$DAX/copy"
    cat "$DAX/copy" >"$DAX/plain"
    mv "$DAX/plain" "$image"/*.data
    rm "$DAX/copy"
    remount "$1" dax=inode
    persistence "$image" 'not known'
    grep '^problem: .*\.data is not served with DAX.*\.map is on DAX.*chattr +x' /tmp/info
    if pcow-backend --socket /tmp/backend0.sock --image "$image" 2>/tmp/backend0.log; then
        fail "the backend serves an image of two domains"
    fi
    cat /tmp/backend0.log
    grep '\.data is not served with DAX.*\.map is on DAX.*chattr +x' /tmp/backend0.log
    # What the message says to do.
    name=$(basename "$image"/*.data)
    cp "$image/$name" "$image/again"
    mv "$image/again" "$image/$name"
    persistence "$image" DAX
}

domains() {
    pcow-img create "$DAX/moved.pcow" 64M
    image_leaves_dax "$1"
    one_file_is_not_on_dax "$1"
    remount "$1" dax=always
    persistence "$DAX/moved.pcow" DAX
    rm -r "$DAX/moved.pcow" "$DAX/flagged"
}
