//! What each path answers. Errors are JSON: `{"error": what, "hint": what to do}`.

use super::metrics::{self, Format};
use super::pieces::Pieces;
use super::series::Histograms;
use super::snapshot::{DecisionRecord, Node, Snapshot, VmState};
use super::source::{NoSnapshot, Snapshots};
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, Request, State, rejection::QueryRejection};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use formtune_core::units::{Nanos, VmId};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;
use std::sync::Arc;

/// Entries of `/v1/decisions` without `limit`.
const DECISIONS: usize = 100;
/// The loop counts as stalled when no sample was taken for this many ticks…
const STALLED_TICKS: u64 = 8;
/// …and at least this long.
const STALLED_AT_LEAST: Nanos = Nanos::from_secs(2);

/// Answer of `/v1/node`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodeAnswer {
    /// See [`Snapshot::at`].
    pub at: Nanos,
    /// The node.
    #[serde(flatten)]
    pub node: Node,
    /// Why `/readyz` says no; empty when it says yes.
    pub not_ready: Vec<String>,
    /// VMs measured now.
    pub vms: usize,
}

/// Answer of `/v1/vms`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmsAnswer {
    /// See [`Snapshot::at`].
    pub at: Nanos,
    /// By name.
    pub vms: Vec<VmState>,
}

/// Answer of `/v1/vms/{id}`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct VmAnswer {
    /// See [`Snapshot::at`].
    pub at: Nanos,
    /// The VM.
    #[serde(flatten)]
    pub vm: VmState,
}

/// Answer of `/v1/decisions`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DecisionsAnswer {
    /// See [`Snapshot::at`].
    pub at: Nanos,
    /// Oldest first; the newest ones, where `limit` cut it.
    pub decisions: Vec<Arc<DecisionRecord>>,
}

/// Every error.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorAnswer {
    /// What went wrong, one line.
    pub error: String,
    /// What to do about it.
    pub hint: String,
}

/// Lets TCP requests through only when they were sent to this machine by a local name. A
/// web page that has its own name resolve to 127.0.0.1 (DNS rebinding) sends that name as
/// `Host`, and is refused.
#[derive(Clone, Copy, Debug)]
pub struct HostGuard {
    /// The port that must be named.
    pub port: u16,
}

impl HostGuard {
    fn allows(self, authority: &str) -> bool {
        let Ok(authority) = authority.parse::<Authority>() else { return false };
        if authority.as_str().contains('@') || authority.port_u16().unwrap_or(80) != self.port {
            return false;
        }
        let host = authority.host();
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        host.eq_ignore_ascii_case("localhost")
            || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    }
}

/// All paths; with a guard for TCP.
pub fn router(snapshots: Snapshots, guard: Option<HostGuard>) -> Router {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/v1/node", get(node))
        .route("/v1/vms", get(vms))
        .route("/v1/vms/{id}", get(vm))
        .route("/v1/decisions", get(decisions))
        .route("/v1/histograms", get(histograms))
        .fallback(no_such_path)
        .method_not_allowed_fallback(not_get)
        .with_state(snapshots)
        .layer(middleware::from_fn(no_body));
    let router = match guard {
        Some(guard) => router.layer(middleware::from_fn_with_state(guard, local_host_only)),
        None => router,
    };
    router.layer(middleware::from_fn(common_headers))
}

async fn local_host_only(State(guard): State<HostGuard>, request: Request, next: Next) -> Response {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let host = hosts.next().and_then(|host| host.to_str().ok());
    let one = hosts.next().is_none();
    let target = request.uri().authority();
    let local = one
        && host.is_some_and(|host| guard.allows(host))
        && target.is_none_or(|target| guard.allows(target.as_str()));
    if local {
        return next.run(request).await;
    }
    let hint = format!("use http://localhost:{0}/ or http://127.0.0.1:{0}/", guard.port);
    failure(StatusCode::MISDIRECTED_REQUEST, "this Host is not served here", &hint)
}

async fn no_body(request: Request, next: Next) -> Response {
    let length = request.headers().get(header::CONTENT_LENGTH);
    if request.headers().contains_key(header::TRANSFER_ENCODING)
        || length.is_some_and(|length| length != "0")
    {
        let mut answer =
            failure(StatusCode::PAYLOAD_TOO_LARGE, "a request body is not taken", "send none");
        answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        return answer;
    }
    next.run(request).await
}

async fn common_headers(request: Request, next: Next) -> Response {
    let mut answer = next.run(request).await;
    let headers = answer.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    answer
}

async fn metrics(State(snapshots): State<Snapshots>, headers: HeaderMap) -> Response {
    let accepts = headers.get_all(header::ACCEPT).iter();
    let format = Format::of(accepts.filter_map(|accept| accept.to_str().ok()));
    match snapshots.get().await {
        Ok(snapshot) => {
            let (pieces, body) = Pieces::channel();
            // Beside this thread, so that one piece is encoded while another is sent. Ends when
            // nobody reads any more.
            tokio::task::spawn_blocking(move || {
                metrics::write(&snapshot, format, &mut |piece| pieces.send(piece))
            });
            let head = [(header::CONTENT_TYPE, format.content_type()), (header::VARY, "accept")];
            (head, Body::new(body)).into_response()
        }
        Err(error) => no_snapshot(error),
    }
}

#[derive(Serialize)]
struct Health {
    healthy: bool,
    reasons: Vec<String>,
}

async fn healthz(State(snapshots): State<Snapshots>) -> Response {
    let stalled = match snapshots.get().await {
        Ok(snapshot) => stalled(&snapshot),
        Err(error) => Some(error.to_string()),
    };
    let healthy = stalled.is_none();
    (status(healthy), Json(Health { healthy, reasons: stalled.into_iter().collect() }))
        .into_response()
}

#[derive(Serialize)]
struct Readiness {
    ready: bool,
    reasons: Vec<String>,
}

async fn readyz(State(snapshots): State<Snapshots>) -> Response {
    let reasons = match snapshots.get().await {
        Ok(snapshot) => not_ready(&snapshot),
        Err(error) => vec![error.to_string()],
    };
    let ready = reasons.is_empty();
    (status(ready), Json(Readiness { ready, reasons })).into_response()
}

const fn status(good: bool) -> StatusCode {
    if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

async fn node(State(snapshots): State<Snapshots>) -> Response {
    answer(snapshots.get().await, |snapshot| NodeAnswer {
        at: snapshot.at,
        node: snapshot.node.clone(),
        not_ready: not_ready(snapshot),
        vms: snapshot.vms.len(),
    })
}

async fn vms(State(snapshots): State<Snapshots>) -> Response {
    answer(snapshots.get().await, |snapshot| VmsAnswer {
        at: snapshot.at,
        vms: snapshot.vms.values().cloned().collect(),
    })
}

async fn vm(State(snapshots): State<Snapshots>, Path(id): Path<String>) -> Response {
    let snapshot = match snapshots.get().await {
        Ok(snapshot) => snapshot,
        Err(error) => return no_snapshot(error),
    };
    let by_uuid = || snapshot.vms.values().find(|vm| vm.uuid.as_deref() == Some(&id));
    match snapshot.vms.get(&VmId::from(id.clone())).or_else(by_uuid) {
        Some(vm) => Json(VmAnswer { at: snapshot.at, vm: vm.clone() }).into_response(),
        None => {
            let names = snapshot.vms.keys().map(|vm| vm.as_str());
            let hint = match nearest(&id, names) {
                Some(name) => format!("did you mean {name}?"),
                None => "see /v1/vms or `formtune status` for all".into(),
            };
            failure(StatusCode::NOT_FOUND, &format!("no vm {id:?} is measured on this node"), &hint)
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Selection {
    vm: Option<String>,
    limit: Option<usize>,
}

async fn decisions(
    State(snapshots): State<Snapshots>,
    selection: Result<Query<Selection>, QueryRejection>,
) -> Response {
    let Query(Selection { vm, limit }) = match selection {
        Ok(selection) => selection,
        Err(error) => {
            let hint = "use ?vm=NAME and ?limit=N, N a number up to 1000";
            return failure(StatusCode::BAD_REQUEST, &error.body_text(), hint);
        }
    };
    answer(snapshots.get().await, |snapshot| {
        let about =
            |record: &&Arc<DecisionRecord>| vm.as_ref().is_none_or(|vm| record.vm.as_str() == vm);
        let newest = snapshot.decisions.iter().rev().filter(about);
        let mut decisions: Vec<_> = newest.take(limit.unwrap_or(DECISIONS)).cloned().collect();
        decisions.reverse();
        DecisionsAnswer { at: snapshot.at, decisions }
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OneVm {
    vm: Option<String>,
}

async fn histograms(
    State(snapshots): State<Snapshots>,
    selection: Result<Query<OneVm>, QueryRejection>,
) -> Response {
    let Query(OneVm { vm }) = match selection {
        Ok(selection) => selection,
        Err(error) => {
            return failure(StatusCode::BAD_REQUEST, &error.body_text(), "use ?vm=NAME");
        }
    };
    answer(snapshots.get().await, |snapshot| Histograms::of(snapshot, vm.as_deref()))
}

async fn no_such_path() -> Response {
    let hint = "there are /metrics, /healthz, /readyz, /v1/node, /v1/vms, /v1/vms/{id}, \
                /v1/decisions and /v1/histograms";
    failure(StatusCode::NOT_FOUND, "no such path", hint)
}

async fn not_get() -> Response {
    let mut answer = failure(
        StatusCode::METHOD_NOT_ALLOWED,
        "only GET is served",
        "nothing can be changed here",
    );
    answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
    answer
}

fn answer<T: Serialize>(
    snapshot: Result<Arc<Snapshot>, NoSnapshot>,
    of: impl FnOnce(&Snapshot) -> T,
) -> Response {
    match snapshot {
        Ok(snapshot) => Json(of(&snapshot)).into_response(),
        Err(error) => no_snapshot(error),
    }
}

fn no_snapshot(error: NoSnapshot) -> Response {
    let hint = "see the agent's log; `formtune restore` puts the knobs back without it";
    failure(StatusCode::SERVICE_UNAVAILABLE, &error.to_string(), hint)
}

fn failure(status: StatusCode, error: &str, hint: &str) -> Response {
    (status, Json(ErrorAnswer { error: error.into(), hint: hint.into() })).into_response()
}

/// Why the loop counts as stalled.
fn stalled(snapshot: &Snapshot) -> Option<String> {
    let agent = &snapshot.node.agent;
    let silent = snapshot.at.since(agent.last_tick_at.unwrap_or(agent.started_at));
    let limit = Nanos(agent.tick.0.saturating_mul(STALLED_TICKS)).max(STALLED_AT_LEAST);
    (silent > limit)
        .then(|| format!("no sample was taken for {silent}, with a tick of {}", agent.tick))
}

/// Why the agent is not doing its job, although it may be alive.
fn not_ready(snapshot: &Snapshot) -> Vec<String> {
    let node = &snapshot.node;
    let mut reasons = Vec::new();
    if node.agent.last_tick_at.is_none() {
        reasons.push("no sample was taken yet".into());
    }
    reasons.extend(stalled(snapshot));
    reasons.extend(node.probe.blind.as_ref().map(|why| format!("blind: {why}")));
    reasons.extend(node.enforce_blocked.as_ref().map(|why| format!("enforce is held back: {why}")));
    reasons
}

/// The name most like `wanted`, if one is alike at all.
pub fn nearest<'a>(wanted: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    names
        .map(|name| (strsim::jaro_winkler(wanted, name), name))
        .filter(|(likeness, _)| *likeness > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_local_names_with_our_port_are_hosts() {
        let guard = HostGuard { port: 19752 };
        for good in ["localhost:19752", "LocalHost:19752", "127.0.0.1:19752", "[::1]:19752"] {
            assert!(guard.allows(good), "{good}");
        }
        for bad in [
            "",
            "localhost",
            "localhost:80",
            "localhost:19753",
            "evil.example:19752",
            "localhost.evil.example:19752",
            "127.0.0.1.evil.example:19752",
            "user@localhost:19752",
            "evil.example:19752@localhost:19752",
            "192.0.2.7:19752",
            "[::]:19752",
            "0.0.0.0:19752",
            "localhost:19752/x",
            "localhost :19752",
        ] {
            assert!(!guard.allows(bad), "{bad}");
        }
        assert!(HostGuard { port: 80 }.allows("localhost"));
    }

    #[test]
    fn nearest_is_alike_or_nothing() {
        let names = ["web-1", "web-2", "database"];
        assert_eq!(nearest("datbase", names.into_iter()), Some("database"));
        assert_eq!(nearest("web2", names.into_iter()), Some("web-2"));
        assert_eq!(nearest("xyzzy", names.into_iter()), None);
    }
}
