//! How a snapshot gets from the loop to those who ask.
//!
//! A request is sent to the daemon's loop, which answers between two ticks. So a node
//! nobody looks at pays nothing, and a loop that hangs is noticed by not answering.

use super::snapshot::Snapshot;
use formtune_core::units::Nanos;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, mpsc, oneshot};

/// Sent to the loop; it answers with a snapshot.
pub type SnapshotRequest = oneshot::Sender<Arc<Snapshot>>;

/// A snapshot this fresh is used again: whoever asks in a loop cannot make the agent build
/// more than ten a second.
const REUSE_FOR: Duration = Duration::from_millis(100);

/// What was answered, and when.
type Answer = (Instant, Arc<Snapshot>);

/// The side that asks. Clones share what was answered last.
#[derive(Clone, Debug)]
pub struct Snapshots {
    requests: mpsc::Sender<SnapshotRequest>,
    last: Arc<Mutex<Option<Answer>>>,
    patience: Duration,
}

/// The loop did not answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoSnapshot {
    /// It did not get to it in time.
    #[error("the agent's loop has not answered for {} ms", .0.as_millis())]
    Stalled(Duration),
    /// It has ended.
    #[error("the agent is stopping")]
    Stopping,
}

/// Makes both ends. `tick` is the time between two samples: a loop that does not answer
/// within eight ticks, and at least two seconds, counts as stalled.
pub fn channel(tick: Nanos) -> (Snapshots, mpsc::Receiver<SnapshotRequest>) {
    let (requests, receiver) = mpsc::channel(4);
    let patience = Duration::from_nanos(tick.0.saturating_mul(8)).max(Duration::from_secs(2));
    (Snapshots { requests, last: Arc::default(), patience }, receiver)
}

impl Snapshots {
    /// A snapshot at most 100 ms old.
    pub async fn get(&self) -> Result<Arc<Snapshot>, NoSnapshot> {
        let ask = async {
            // Held while waiting for the answer: of many who ask at once, one asks the loop.
            let mut last = self.last.lock().await;
            if let Some((at, snapshot)) = &*last
                && at.elapsed() < REUSE_FOR
            {
                return Ok(snapshot.clone());
            }
            let (reply, answer) = oneshot::channel();
            self.requests.send(reply).await.map_err(|_| NoSnapshot::Stopping)?;
            let snapshot = answer.await.map_err(|_| NoSnapshot::Stopping)?;
            *last = Some((Instant::now(), snapshot.clone()));
            Ok(snapshot)
        };
        let answer = tokio::time::timeout(self.patience, ask).await;
        answer.unwrap_or(Err(NoSnapshot::Stalled(self.patience)))
    }
}
