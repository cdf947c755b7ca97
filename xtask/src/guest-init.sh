#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The test guest's init: loads the modules, runs /script, reports its status, powers off.
/bin/busybox --install -s 2>/dev/null
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mount -t tmpfs tmp /tmp
# shellcheck disable=SC2046 # one name per word
modprobe -a $(cat /etc/modules) || echo "PCOW-GUEST-MODULES-MISSING"
sh /script
echo "PCOW-GUEST-EXIT $?"
# Setting the terminal waits until everything written has left it.
stty sane
poweroff -f
