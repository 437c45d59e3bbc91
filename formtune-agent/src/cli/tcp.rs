//! The line of `formtune explain` about TCP.

use super::OneLine;
use super::style::grouped;
use crate::export::tcp::{GuestTcp, TcpWay, VmTcp};
use std::fmt::Write;

/// `None` where nothing is known.
pub fn line(tcp: &VmTcp) -> Option<String> {
    let host = tcp.host.map(|host| match host.retransmitted {
        0 => "the host sent nothing again for it".to_owned(),
        n => format!("the host sent {} segments again for it", grouped(n)),
    });
    let parts: Vec<String> = tcp.guest.as_ref().map(guest).into_iter().chain(host).collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

fn guest(guest: &GuestTcp) -> String {
    let mut text =
        format!("it sent {} and received {}", share(&guest.sent), share(&guest.received));
    let untracked = guest.sent.untracked + guest.received.untracked;
    if untracked > 0 {
        let _ = write!(text, ", {} segments not followed", grouped(untracked));
    }
    match &guest.taps[..] {
        [] => text.push_str(", on devices that are gone"),
        taps => {
            let _ = write!(text, ", on {}", OneLine(&taps.join(", ")));
        }
    }
    text
}

/// `12 of 3,000 segments again (0.40 %)`.
fn share(way: &TcpWay) -> String {
    match way.ratio() {
        None => "no segments".into(),
        Some(ratio) => format!(
            "{} of {} segments again ({:.2} %)",
            grouped(way.retransmitted),
            grouped(way.segments),
            ratio * 100.0
        ),
    }
}
