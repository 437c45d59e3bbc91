//! The running kernel's own BTF, damaged: one line or an answer, never a panic.

use formtune_agent::sense::btf::{Btf, BtfError, VMLINUX};

/// What the run-queue probe asks for.
const FIELDS: [(&str, &str); 3] =
    [("task_struct", "sched_info.last_queued"), ("css_set", "dfl_cgrp"), ("kernfs_node", "id")];

#[test]
fn cut_short_it_is_refused_or_read_as_far_as_it_goes() {
    let whole = std::fs::read(VMLINUX).unwrap();
    let offsets = |btf: &Btf| FIELDS.map(|(structure, path)| btf.offset(structure, path).ok());
    let found = offsets(&Btf::parse(whole.clone()).unwrap());
    assert!(found.iter().all(Option::is_some), "{found:?}");
    let (mut refused, mut read) = (0, 0);
    // Within the header, and 48 places all over the file.
    let lengths = (0..24).step_by(3).chain((1..48).map(|part| whole.len() / 48 * part + part));
    for length in lengths {
        match Btf::parse(whole[..length].to_vec()) {
            Ok(btf) => {
                read += 1;
                // What it still says is not something else.
                for (cut, whole) in offsets(&btf).iter().zip(&found) {
                    assert!(cut.is_none() || cut == whole, "{length}: {cut:?}");
                }
            }
            Err(error @ BtfError::Malformed(_)) => {
                refused += 1;
                assert_eq!(error.to_string().lines().count(), 1, "{error}");
            }
            Err(error) => panic!("{length}: {error}"),
        }
    }
    println!("{refused} refused, {read} read as far as they go");
    assert!(refused > 0);
}

#[test]
fn what_this_kernel_lacks_is_named_in_one_line() {
    let btf = Btf::read(VMLINUX.as_ref()).unwrap();
    for path in ["no_such_member", "sched_info.no_such_member", "", ".", "sched_info."] {
        let error = btf.offset("task_struct", path).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("this kernel's BTF has no struct task_struct with a member {path}")
        );
    }
    assert!(btf.offset("no_such_struct", "a").is_err());
}
