//! Who makes a VM wait.
//!
//! Where the probe knows who held the CPU during a VM's long waits, that is the answer:
//! whoever held it for a notable share, of a lower priority, or of the same one and using
//! more than its entitlement; nobody, if the CPU was idle. Where it does not, CPU used beyond
//! the entitlement has to do.
//!
//! A VM's entitlement is its share, by weight, of the node among the VMs that run at all.
//! Blame goes by CPU used beyond it: only the polluter pays (Alita, SC 2020), the lowest
//! priority first. The wait of a VM that itself uses more of its entitlement than anybody
//! else is its own doing: more runnable vCPUs than its share gives.
//!
//! The node's CPUs are not always one pool: VMs pinned to few of them, or a host that is busy
//! with other things, make a VM wait although nobody exceeds a share of the whole node. Then
//! those of a lower priority who use more than the victim are suspected, and verify-then-keep
//! clears the innocent.

use crate::estimate::rounded;
use crate::plan::Usage;
use crate::policy::Priority;
use crate::sample::HeldInterval;
use crate::units::VmId;
use alloc::vec::Vec;
use core::cmp::Ordering;

/// A VM that uses less than this many CPUs does not run, and claims nothing of the node.
const RUNS: f64 = 0.01;

/// Least use beyond the entitlement, as a share of it, that counts. Below lie the errors of
/// reading usage and time one after the other.
const EXCESS: f64 = 0.05;

/// A culprit uses at least this many times what the victim uses, each against its
/// entitlement; among equals nobody is to blame.
const MORE_THAN_VICTIM: f64 = 1.1;

/// Of the polluters, those who exceed their entitlement by at least this share of what the
/// worst one does. The small fry would lose their share and hardly give the victim any.
const OF_WORST: f64 = 0.25;

/// Least share of a victim's long waits that makes whoever held the CPU a culprit.
const CAUSED: f64 = 0.05;

/// From this share on, a victim's waits are the doing of whoever held the CPU alone: its own
/// vCPUs, the host's tasks, or nobody's at all.
pub const MOST: f64 = 0.5;

/// Most VMs lowered at once for one victim. The worst go first; should they not be enough,
/// the next action takes the next.
pub const AT_ONCE: usize = 16;

/// Most polluters looked at in one step; bounds a step on a node where everybody is one.
const LOOKED_AT: usize = 256;

/// What blame needs to know of a VM.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    /// Weight that the VM is entitled to.
    pub entitlement: f64,
    /// CPUs used lately.
    pub uses: Option<f64>,
    /// Priority of its class.
    pub priority: Priority,
}

/// A VM that uses more than it is entitled to.
#[derive(Clone, Copy, Debug)]
pub struct Polluter {
    /// Index of the VM.
    pub index: usize,
    /// Priority of its class.
    pub priority: Priority,
    /// `None` where nobody's usage is known.
    pub usage: Option<Usage>,
    /// Share of the victim's long waits for which it held the CPU; `None` where nobody knows.
    pub caused: Option<f64>,
    excess: f64,
    /// Use per weight of entitlement.
    ratio: f64,
}

/// The node's claims, weighed against each other once per step.
#[derive(Debug)]
pub struct Blame {
    /// CPUs per weight of entitlement.
    cpus_per_weight: f64,
    greatest: Greatest,
    lowest_running: Option<Priority>,
    /// Lowest priority first, then worst first.
    polluters: Vec<Polluter>,
    /// Those that run within their entitlement, in the same order, by CPUs used.
    suspects: Vec<Polluter>,
}

/// The greatest use per weight, and the second, so that each VM can be compared with the
/// others.
#[derive(Clone, Copy, Debug, Default)]
struct Greatest {
    first: Option<(usize, f64)>,
    second: f64,
}

impl Greatest {
    fn take(&mut self, index: usize, ratio: f64) {
        match self.first {
            Some((_, first)) if ratio <= first => self.second = self.second.max(ratio),
            before => {
                self.second = before.map_or(0.0, |(_, ratio)| ratio);
                self.first = Some((index, ratio));
            }
        }
    }

    fn of_others(&self, index: usize) -> f64 {
        match self.first {
            Some((first, ratio)) if first != index => ratio,
            _ => self.second,
        }
    }
}

impl Blame {
    /// Weighs the claims of all VMs, given in the order of their indices.
    pub fn new(cpus: u32, claims: &[Claim]) -> Self {
        let runs = |claim: &Claim| claim.uses.is_none_or(|uses| uses >= RUNS);
        let total: f64 = claims.iter().filter(|c| runs(c)).map(|c| c.entitlement).sum();
        let cpus_per_weight = f64::from(cpus) / total.max(1.0);
        let mut greatest = Greatest::default();
        let (mut polluters, mut suspects) = (Vec::new(), Vec::new());
        for (index, claim) in claims.iter().enumerate() {
            let Some(uses) = claim.uses else { continue };
            let entitled = claim.entitlement * cpus_per_weight;
            let (excess, ratio) = (uses - entitled, uses / claim.entitlement);
            greatest.take(index, ratio);
            let usage = Some(Usage { uses: rounded(uses), entitled: rounded(entitled) });
            let priority = claim.priority;
            if uses >= RUNS && excess > EXCESS * entitled {
                polluters.push(Polluter { index, priority, usage, caused: None, excess, ratio });
            } else if uses >= RUNS {
                let excess = uses;
                suspects.push(Polluter { index, priority, usage, caused: None, excess, ratio });
            }
        }
        // Nothing at all is known: everybody may be to blame, nobody more than another.
        let known = claims.iter().filter(|claim| claim.uses.is_some()).count();
        if known == 0 {
            polluters.extend(claims.iter().enumerate().map(|(index, claim)| Polluter {
                index,
                priority: claim.priority,
                usage: None,
                caused: None,
                excess: 0.0,
                ratio: f64::INFINITY,
            }));
        }
        worst_first(&mut polluters);
        worst_first(&mut suspects);
        let lowest_running = claims.iter().filter(|c| runs(c)).map(|c| c.priority).min();
        Self { cpus_per_weight, greatest, lowest_running, polluters, suspects }
    }

    /// `Some` if the VM's wait is its own: it uses more than it is entitled to, and nobody
    /// uses more of their entitlement.
    pub fn own_fault(&self, index: usize, claim: &Claim) -> Option<Usage> {
        let uses = claim.uses?;
        let entitled = claim.entitlement * self.cpus_per_weight;
        let worse = self.greatest.of_others(index) > MORE_THAN_VICTIM * uses / claim.entitlement;
        (uses > entitled * (1.0 + EXCESS) && !worse)
            .then(|| Usage { uses: rounded(uses), entitled: rounded(entitled) })
    }

    /// Who may be lowered for a victim's sake: lowest priority first, then worst first;
    /// nobody of a higher priority than the victim's. Where nobody exceeds an entitlement,
    /// suspects of a lower priority.
    pub fn polluters<'a>(
        &'a self,
        victim: usize,
        claim: &Claim,
    ) -> impl Iterator<Item = &'a Polluter> {
        let mut guilty = among(&self.polluters, victim, claim).peekable();
        let nobody = guilty.peek().is_none();
        let below = claim.priority;
        let suspects = among(&self.suspects, victim, claim)
            .take_while(move |suspect| nobody && suspect.priority < below);
        guilty.chain(suspects)
    }

    /// Those of `held` who may be lowered for a victim's sake, in the order of
    /// [`Blame::polluters`]; `find` gives a VM's index.
    pub fn holders(
        &self,
        victim: usize,
        claims: &[Claim],
        held: &HeldInterval,
        find: impl Fn(&VmId) -> Option<usize>,
    ) -> Vec<Polluter> {
        let of_victim = &claims[victim];
        let ratio = |claim: &Claim| claim.uses.map(|uses| uses / claim.entitlement);
        let total = held.total_ns().max(1) as f64;
        let mut found = Vec::new();
        for (id, ns) in &held.by_vm {
            let caused = *ns as f64 / total;
            let Some(index) = find(id).filter(|index| *index != victim) else { continue };
            let claim = &claims[index];
            let entitled = claim.entitlement * self.cpus_per_weight;
            // Among equals it is no guilt to use what one is entitled to.
            let greedy = claim.uses.is_some_and(|uses| uses > entitled * (1.0 + EXCESS))
                && ratio(claim) > ratio(of_victim).map(|ratio| ratio * MORE_THAN_VICTIM);
            let guilty = match claim.priority.cmp(&of_victim.priority) {
                Ordering::Less => true,
                Ordering::Equal => greedy,
                Ordering::Greater => false,
            };
            if guilty && caused >= CAUSED {
                let usage = claim
                    .uses
                    .map(|uses| Usage { uses: rounded(uses), entitled: rounded(entitled) });
                let (priority, caused) = (claim.priority, Some(rounded(caused)));
                let polluter =
                    Polluter { index, priority, usage, caused, excess: *ns as f64, ratio: 0.0 };
                found.push(polluter);
            }
        }
        worst_first(&mut found);
        let mut worst = None;
        found.retain(|polluter| notable(&mut worst, polluter));
        found
    }

    /// Whether anybody of a lower priority runs: then raising a victim takes from them.
    pub fn anybody_below(&self, priority: Priority) -> bool {
        self.lowest_running.is_some_and(|lowest| lowest < priority)
    }
}

/// Sorts, lowest priority first, and keeps the worst [`LOOKED_AT`].
fn worst_first(polluters: &mut Vec<Polluter>) {
    let order = |a: &Polluter, b: &Polluter| {
        let worst_first = b.excess.total_cmp(&a.excess);
        a.priority.cmp(&b.priority).then(worst_first).then(a.index.cmp(&b.index))
    };
    if polluters.len() > LOOKED_AT {
        polluters.select_nth_unstable_by(LOOKED_AT, order);
        polluters.truncate(LOOKED_AT);
    }
    polluters.sort_unstable_by(order);
}

/// Those of a sorted list who use more of their entitlement than the victim, nobody of a
/// higher priority, and of each priority none that is small fry beside its worst.
fn among<'a>(
    list: &'a [Polluter],
    victim: usize,
    claim: &Claim,
) -> impl Iterator<Item = &'a Polluter> {
    let ratio = claim.uses.map_or(0.0, |uses| uses / claim.entitlement);
    let priority = claim.priority;
    let mut worst = None;
    list.iter()
        .take_while(move |polluter| polluter.priority <= priority)
        .filter(move |polluter| {
            polluter.index != victim && polluter.ratio > MORE_THAN_VICTIM * ratio
        })
        .filter(move |polluter| notable(&mut worst, polluter))
}

/// Whether somebody is no small fry beside the worst of the same priority, who comes first.
fn notable(worst: &mut Option<(Priority, f64)>, polluter: &Polluter) -> bool {
    match *worst {
        Some((priority, excess)) if priority == polluter.priority => {
            polluter.excess >= OF_WORST * excess
        }
        _ => {
            *worst = Some((polluter.priority, polluter.excess));
            true
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(uses: Option<f64>) -> Claim {
        Claim { entitlement: 100.0, uses, priority: Priority::Normal }
    }

    fn names(blame: &Blame, victim: usize, claims: &[Claim]) -> Vec<usize> {
        blame.polluters(victim, &claims[victim]).map(|p| p.index).collect()
    }

    #[test]
    fn idle_vms_claim_nothing() {
        let mut claims = alloc::vec![claim(Some(0.2)), claim(Some(0.9)), claim(Some(0.95))];
        claims.extend([claim(Some(0.001)); 50]);
        let blame = Blame::new(2, &claims);
        assert_eq!(names(&blame, 0, &claims), [2, 1]);
        let usage = blame.polluters(0, &claims[0]).next().unwrap().usage.unwrap();
        assert_eq!((usage.uses, usage.entitled), (0.95, 0.667));
        assert_eq!(blame.own_fault(0, &claims[0]), None);
    }

    #[test]
    fn among_equals_nobody_is_to_blame() {
        let claims = [claim(Some(1.0)), claim(Some(1.02)), claim(Some(0.02))];
        let blame = Blame::new(2, &claims);
        assert_eq!(names(&blame, 0, &claims), []);
        assert!(blame.own_fault(0, &claims[0]).is_some());
        assert_eq!(blame.own_fault(2, &claims[2]), None);
    }

    #[test]
    fn never_a_higher_priority_and_the_lowest_first() {
        let with = |uses, priority| Claim { priority, ..claim(Some(uses)) };
        let claims = [
            with(0.1, Priority::Normal),
            with(1.5, Priority::High),
            with(1.2, Priority::Normal),
            with(1.1, Priority::Low),
            with(0.1, Priority::Low),
        ];
        let blame = Blame::new(4, &claims);
        assert_eq!(names(&blame, 0, &claims), [3, 2]);
        assert!(blame.anybody_below(Priority::Normal) && !blame.anybody_below(Priority::Low));
    }

    /// Two spinners and a victim pinned to one of four CPUs: nobody exceeds a third of four.
    #[test]
    fn where_nobody_exceeds_a_share_of_the_node_lower_priorities_are_suspected() {
        let with = |uses, priority| Claim { priority, ..claim(Some(uses)) };
        let claims = [
            with(0.2, Priority::High),
            with(0.4, Priority::Low),
            with(0.41, Priority::Low),
            with(0.05, Priority::Low),
            with(0.4, Priority::High),
        ];
        let blame = Blame::new(4, &claims);
        assert_eq!(names(&blame, 0, &claims), [2, 1], "not who uses little, nor an equal");
        assert_eq!(names(&blame, 1, &claims), [], "nobody is below the lowest");
        let mut claims = claims;
        claims[1].uses = Some(2.0);
        let blame = Blame::new(4, &claims);
        assert_eq!(names(&blame, 0, &claims), [1], "with a polluter there are no suspects");
    }

    #[test]
    fn whoever_held_the_cpu_is_to_blame_if_it_may_be_asked() {
        let with = |uses, priority| Claim { priority, ..claim(uses) };
        let claims = [
            with(Some(0.2), Priority::Normal),
            with(None, Priority::Low),
            with(Some(0.1), Priority::Low),
            with(Some(0.1), Priority::Normal),
            with(Some(1.5), Priority::Normal),
            with(Some(1.9), Priority::High),
        ];
        let blame = Blame::new(2, &claims);
        let holders = |ns: [u64; 6]| {
            let names = ["0", "1", "2", "3", "4", "5"];
            let by_vm = names.iter().zip(ns).map(|(name, ns)| (VmId::from(*name), ns)).collect();
            let held = HeldInterval { by_vm, by_host_ns: 100, ..Default::default() };
            let found = blame.holders(0, &claims, &held, |id| id.0.parse().ok());
            found.iter().map(|p| p.index).collect::<Vec<_>>()
        };
        assert_eq!(holders([100, 100, 500, 500, 500, 500]), [2, 4], "small fry, modest equals");
        assert_eq!(holders([0, 300, 500, 0, 0, 0]), [2, 1], "usage need not be known");
        assert_eq!(holders([500, 0, 0, 0, 0, 500]), [], "itself, and its betters");
        assert_eq!(holders([900, 0, 30, 0, 0, 0]), [], "a twentieth is the least");
    }

    #[test]
    fn unknown_usage_is_no_guilt_unless_nothing_is_known() {
        let claims = [claim(None), claim(None), claim(Some(1.9))];
        assert_eq!(names(&Blame::new(2, &claims), 0, &claims), [2]);
        let claims = [claim(None), claim(None), claim(None)];
        assert_eq!(names(&Blame::new(2, &claims), 0, &claims), [1, 2]);
    }
}
