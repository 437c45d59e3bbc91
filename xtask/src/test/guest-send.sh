#!/bin/busybox sh
# Sends `bytes` to `to` in bulk, then says what its TCP did; both come from the kernel's
# command line.
ip addr add "$address" dev eth0
ip link set eth0 up
head -c "$bytes" /dev/zero | nc "${to%:*}" "${to#*:}"
while read -r line; do
    case "$line" in Tcp:*) echo "SNMP $line" ;; esac
done < /proc/net/snmp
