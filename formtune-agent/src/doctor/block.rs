//! Whether block I/O can be measured, and by which method on which device.

use super::Check;
use crate::sense::ProbeState;
use crate::sense::block;
use crate::sense::cgroup::Hierarchies;
use std::path::Path;

pub(super) fn program(hierarchies: Option<&Hierarchies>, may_load: bool) -> Check {
    let name = "block";
    let what = "block_rq_complete (block I/O latency)";
    let Some(hierarchies) = hierarchies.filter(|_| may_load) else {
        let found = format!("{what} was not tried: it needs cgroups and the rights named above");
        return Check::finding(name, found, "see there");
    };
    match block::trial(hierarchies) {
        ProbeState::Loaded => {
            let (stamps, map) = methods(Path::new("/sys/block"));
            let mut found = format!("{what} loads and attaches");
            if !stamps.is_empty() {
                found += &format!("; requests carry their times on {}", stamps.join(", "));
            }
            if map.is_empty() {
                return Check::ok(name, found);
            }
            found += &format!("; times are noted in a map for {}", map.join(", "));
            let remedy = "measured all the same, at a higher price; `iostats` and `wbt_lat_usec` \
                          in the queue's folder of /sys/block have the kernel note the times";
            Check::note(name, found, remedy)
        }
        ProbeState::Unavailable { program, why, remedy } => {
            Check::finding(name, format!("{program} cannot be loaded: {why}"), remedy)
        }
    }
}

/// Devices with a queue of requests: those whose requests carry both times, and the others.
fn methods(folder: &Path) -> (Vec<String>, Vec<String>) {
    let (mut stamps, mut map) = (Vec::new(), Vec::new());
    let mut devices: Vec<_> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    devices.sort();
    for device in devices {
        let folder = folder.join(&device);
        let read = |file: &str| std::fs::read_to_string(folder.join(file)).unwrap_or_default();
        // Without one its I/O is that of the devices below it (dm, md); empty ones are many.
        if !folder.join("mq").exists() || read("size").trim() == "0" {
            continue;
        }
        // Given to the device: noted while somebody keeps statistics (`QUEUE_FLAG_STATS`),
        // which are writeback throttling and these two schedulers.
        let throttling = read("queue/wbt_lat_usec").trim().parse::<u64>().is_ok_and(|us| us > 0);
        let scheduler = read("queue/scheduler");
        let keeps = throttling || scheduler.contains("[kyber]") || scheduler.contains("[bfq]");
        if read("queue/iostats").trim() != "0" && keeps {
            stamps.push(device);
        } else {
            map.push(device);
        }
    }
    (stamps, map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_told_apart_by_what_their_queue_keeps() {
        let folder = tempfile::tempdir().unwrap();
        let device = |name: &str, iostats: &str, wbt: &str, scheduler: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.join("mq/0")).unwrap();
            std::fs::create_dir_all(path.join("queue")).unwrap();
            std::fs::write(path.join("size"), "2048\n").unwrap();
            std::fs::write(path.join("queue/iostats"), iostats).unwrap();
            std::fs::write(path.join("queue/wbt_lat_usec"), wbt).unwrap();
            std::fs::write(path.join("queue/scheduler"), scheduler).unwrap();
        };
        device("sda", "1\n", "75000\n", "[mq-deadline] none\n");
        device("sdb", "0\n", "75000\n", "[mq-deadline] none\n");
        device("sdc", "1\n", "0\n", "mq-deadline [none]\n");
        device("sdd", "1\n", "0\n", "mq-deadline [bfq] none\n");
        device("empty", "1\n", "0\n", "[none]\n");
        std::fs::write(folder.path().join("empty/size"), "0\n").unwrap();
        std::fs::create_dir_all(folder.path().join("dm-0/queue")).unwrap();
        let (stamps, map) = methods(folder.path());
        assert_eq!((stamps.join(" "), map.join(" ")), ("sda sdd".into(), "sdb sdc".into()));
    }
}
