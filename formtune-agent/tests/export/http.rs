use crate::fixture::{AT, Served};
use formtune_agent::export::metrics::protobuf;
use formtune_agent::export::series::Histograms;
use formtune_core::units::Nanos;
use serde_json::Value;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Status and everything after it.
struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }
    /// Every error is JSON with a hint.
    fn error(&self) -> String {
        let json = self.json();
        assert!(!json["hint"].as_str().unwrap().is_empty(), "{json}");
        json["error"].as_str().unwrap().to_owned()
    }
}

/// Sends raw bytes, so that nothing is made right by a client library.
fn send(mut stream: impl Read + Write, request: &str) -> Answer {
    stream.write_all(request.as_bytes()).unwrap();
    let mut all = Vec::new();
    // The server may reset a connection whose request it did not read to the end.
    let _ = stream.read_to_end(&mut all);
    let all = String::from_utf8(all).unwrap();
    let (head, body) = all.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head: {all:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
}

fn unix(served: &Served, path: &str) -> Answer {
    let request = format!("GET {path} HTTP/1.1\r\nHost: formtune\r\nConnection: close\r\n\r\n");
    send(UnixStream::connect(&served.socket).unwrap(), &request)
}

fn tcp(served: &Served, head: &str) -> Answer {
    let stream = TcpStream::connect(served.tcp).unwrap();
    send(stream, &format!("{head}\r\nConnection: close\r\n\r\n"))
}

#[test]
fn the_socket_has_the_right_mode_and_goes_with_the_server() {
    let served = Served::new();
    let mode = std::fs::metadata(&served.socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o660);
    assert_eq!(unix(&served, "/healthz").status, 200);
    let socket = served.socket.clone();
    drop(served);
    assert!(!socket.exists());
}

#[test]
fn every_path_answers() {
    let served = Served::new();
    let node = unix(&served, "/v1/node").json();
    assert_eq!(node["kernel"], "6.12.48-amd64");
    assert_eq!(node["modes"]["cpu_weight"], "enforce");
    assert_eq!(node["vms"], 4);
    assert_eq!(node["not_ready"].as_array().unwrap().len(), 0);

    let vms = unix(&served, "/v1/vms").json();
    assert_eq!(vms["vms"].as_array().unwrap().len(), 4);
    let web = unix(&served, "/v1/vms/web-1").json();
    assert_eq!(web["cpu_weight"], 150);
    assert_eq!(web["decision"]["evidence"]["slack"], -1.1);
    assert_eq!(web["last_action"]["outcome"]["result"], "applied");
    let uuid = web["uuid"].as_str().unwrap();
    assert_eq!(unix(&served, &format!("/v1/vms/{uuid}")).json()["id"], "web-1");
    let odd = unix(&served, "/v1/vms/a%22b%5Cc%2Fd%20%C3%A9");
    assert_eq!(odd.json()["id"], "a\"b\\c/d é");

    let missing = unix(&served, "/v1/vms/web-l");
    assert_eq!(missing.status, 404);
    assert!(missing.json()["hint"].as_str().unwrap().contains("web-1"), "{}", missing.body);

    let metrics = unix(&served, "/metrics");
    assert!(metrics.head.contains("content-type: text/plain; version=0.0.4"), "{}", metrics.head);
    assert!(metrics.body.contains("formtune_vms 4"));
}

#[test]
fn decisions_are_selected_by_vm_and_limit() {
    let served = Served::new();
    let all = unix(&served, "/v1/decisions").json();
    let seqs: Vec<_> =
        all["decisions"].as_array().unwrap().iter().map(|d| d["seq"].as_u64()).collect();
    assert_eq!(seqs, [Some(1), Some(2), Some(3)]);
    let hog = unix(&served, "/v1/decisions?vm=hog-1").json();
    assert_eq!(hog["decisions"][0]["action"], "lower");
    assert_eq!(hog["decisions"][0]["change"]["to"], 80);
    assert_eq!(hog["decisions"].as_array().unwrap().len(), 1);
    let last = unix(&served, "/v1/decisions?limit=1").json();
    assert_eq!(last["decisions"][0]["seq"], 3);
    for bad in ["limit=many", "limit=-1", "vn=web-1"] {
        let answer = unix(&served, &format!("/v1/decisions?{bad}"));
        assert_eq!(answer.status, 400, "{bad}");
        answer.error();
    }
}

#[test]
fn a_foreign_host_is_turned_away_on_tcp() {
    let served = Served::new();
    let port = served.tcp.port();
    for good in [format!("localhost:{port}"), format!("127.0.0.1:{port}"), format!("[::1]:{port}")]
    {
        let answer = tcp(&served, &format!("GET /v1/vms HTTP/1.1\r\nHost: {good}"));
        assert_eq!(answer.status, 200, "{good}");
    }
    for bad in [
        format!("evil.example:{port}"),
        "localhost".into(),
        "localhost:1".into(),
        format!("localhost.evil.example:{port}"),
        String::new(),
    ] {
        for path in ["/metrics", "/v1/vms", "/no/such/path"] {
            let answer = tcp(&served, &format!("GET {path} HTTP/1.1\r\nHost: {bad}"));
            assert_eq!(answer.status, 421, "{bad:?} {path}");
            answer.error();
            assert!(!answer.body.contains("web-1"));
        }
    }
    // None at all, two of them, and a target that says otherwise.
    assert_eq!(tcp(&served, "GET /v1/vms HTTP/1.0").status, 421);
    let two =
        format!("GET /v1/vms HTTP/1.1\r\nHost: localhost:{port}\r\nHost: evil.example:{port}");
    assert!([400, 421].contains(&tcp(&served, &two).status));
    let absolute =
        format!("GET http://evil.example:{port}/v1/vms HTTP/1.1\r\nHost: localhost:{port}");
    assert_eq!(tcp(&served, &absolute).status, 421);
}

#[test]
fn nothing_but_reading_is_served() {
    let served = Served::new();
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"] {
        let request =
            format!("{method} /v1/vms/web-1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        let answer = send(UnixStream::connect(&served.socket).unwrap(), &request);
        assert_eq!(answer.status, 405, "{method}");
        assert!(answer.head.contains("allow: get, head"), "{}", answer.head);
        answer.error();
    }
    let missing = unix(&served, "/v2/vms");
    assert_eq!(missing.status, 404);
    missing.error();
    for head in ["access-control-allow-origin", "server:"] {
        assert!(!missing.head.contains(head));
    }
    assert!(missing.head.contains("x-content-type-options: nosniff"));
}

#[test]
fn what_a_client_sends_is_bounded() {
    let served = Served::new();
    let body = "GET /v1/vms HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n";
    let answer = send(UnixStream::connect(&served.socket).unwrap(), body);
    assert_eq!(answer.status, 413);

    let long = format!("GET /v1/vms HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n", "y".repeat(20_000));
    let answer = send(UnixStream::connect(&served.socket).unwrap(), &long);
    assert_eq!(answer.status, 431);

    let many: String = (0..100).map(|i| format!("X{i}: y\r\n")).collect();
    let many = format!("GET /v1/vms HTTP/1.1\r\nHost: x\r\n{many}\r\n");
    let answer = send(UnixStream::connect(&served.socket).unwrap(), &many);
    assert_eq!(answer.status, 431);

    let answer = send(UnixStream::connect(&served.socket).unwrap(), "hello\r\n\r\n");
    assert_eq!(answer.status, 400);
}

#[test]
fn clients_that_say_nothing_do_not_shut_others_out() {
    let served = Served::new();
    // More than the server takes at a time: those that wait must get their turn once the
    // silent ones are cut off. No time is measured, only that it happens.
    let silent: Vec<_> = (0..40).map(|_| UnixStream::connect(&served.socket).unwrap()).collect();
    let stream = UnixStream::connect(&served.socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let request = "GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    assert_eq!(send(&stream, request).status, 200);
    // TCP has places of its own.
    let port = served.tcp.port();
    assert_eq!(
        tcp(&served, &format!("GET /healthz HTTP/1.1\r\nHost: localhost:{port}")).status,
        200
    );
    drop(silent);
}

#[test]
fn readiness_says_why_not() {
    let served = Served::new();
    assert_eq!(unix(&served, "/readyz").status, 200);
    let change = |change: fn(&mut formtune_agent::export::Snapshot)| {
        let mut snapshot = crate::fixture::snapshot();
        change(&mut snapshot);
        *served.snapshot.lock().unwrap() = snapshot;
        // Answers are used again for a tenth of a second.
        std::thread::sleep(Duration::from_millis(150));
        let answer = unix(&served, "/readyz");
        (answer.status, answer.json()["reasons"].to_string())
    };
    let (status, reasons) = change(|s| s.node.probe.blind = Some("table full".into()));
    assert!(status == 503 && reasons.contains("blind: table full"), "{status} {reasons}");
    let (status, reasons) = change(|s| s.node.enforce_blocked = Some("journal damaged".into()));
    assert!(status == 503 && reasons.contains("journal damaged"), "{status} {reasons}");
    let (status, reasons) = change(|s| {
        s.node.agent.last_tick_at = None;
        s.node.agent.started_at = s.at;
    });
    assert!(status == 503 && reasons.contains("no sample was taken yet"), "{status} {reasons}");
    assert_eq!(unix(&served, "/healthz").status, 200, "alive, though not ready");

    let (status, reasons) = change(|s| {
        s.node.agent.last_tick_at = Some(Nanos(AT.0 - 3_000_000_000));
    });
    assert!(status == 503 && reasons.contains("no sample was taken for 3.00 s"), "{reasons}");
    assert_eq!(unix(&served, "/healthz").status, 503, "a loop without ticks is not healthy");
}

#[test]
fn a_loop_that_hangs_is_reported_and_one_that_ends_too() {
    let (served, requests) = Served::unanswered();
    for path in ["/healthz", "/readyz", "/metrics", "/v1/vms"] {
        let answer = unix(&served, path);
        assert_eq!(answer.status, 503, "{path}");
        assert!(answer.body.contains("has not answered"), "{}", answer.body);
    }
    drop(requests);
    let answer = unix(&served, "/healthz");
    assert_eq!(answer.status, 503);
    assert!(answer.body.contains("stopping"), "{}", answer.body);
}

#[test]
fn a_connection_serves_several_requests() -> io::Result<()> {
    let served = Served::new();
    let mut stream = UnixStream::connect(&served.socket)?;
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")?;
    let mut first = [0; 12];
    stream.read_exact(&mut first)?;
    assert_eq!(&first, b"HTTP/1.1 200");
    stream.write_all(b"GET /nope HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")?;
    let mut rest = String::new();
    stream.read_to_string(&mut rest)?;
    assert!(rest.contains("HTTP/1.1 404"), "{rest}");
    stream.shutdown(Shutdown::Both).ok();
    Ok(())
}

#[test]
fn metrics_come_in_the_form_that_is_asked_for() {
    let served = Served::new();
    let get = |accept: &str| {
        let mut stream = UnixStream::connect(&served.socket).unwrap();
        write!(stream, "GET /metrics HTTP/1.0\r\nHost: x\r\n{accept}\r\n\r\n").unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        let end = all.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
        (String::from_utf8(all[..end].to_ascii_lowercase()).unwrap(), all.split_off(end + 4))
    };
    let prometheus = "Accept: application/vnd.google.protobuf;\
                      proto=io.prometheus.client.MetricFamily;encoding=delimited,\
                      application/openmetrics-text;version=1.0.0;q=0.8,\
                      text/plain;version=0.0.4;q=0.5,*/*;q=0.1\r\n";
    let (head, body) = get(prometheus);
    assert!(head.contains(
        "content-type: application/vnd.google.protobuf; proto=io.prometheus.client.metricfamily; \
         encoding=delimited"
    ));
    let families = protobuf::decode(&body).unwrap();
    assert!(families.iter().any(|family| family.name == "formtune_vms"));
    for accept in ["", "Accept: */*\r\n", "Accept: text/plain\r\n"] {
        let (head, body) = get(accept);
        assert!(head.contains("content-type: text/plain; version=0.0.4; charset=utf-8"), "{head}");
        assert!(body.starts_with(b"# HELP formtune_"));
    }
}

#[test]
fn histograms_are_given_bucket_by_bucket() {
    let served = Served::new();
    let all: Histograms = serde_json::from_str(&unix(&served, "/v1/histograms").body).unwrap();
    assert_eq!((all.at, all.unix_ms, all.left_out), (AT, 1_790_000_000_000, 0));
    let of = |metric: &str| -> Vec<_> {
        let series = all.histograms.iter().filter(|series| series.metric == metric);
        series.map(|series| series.labels["vm"].as_str()).collect()
    };
    let waited = ["hog-1", "idle-with-a-rather-long-name-0001", "web-1"];
    assert_eq!(of("runqueue_latency"), waited);
    assert_eq!(of("block_latency"), ["web-1"; 5]);
    let one = unix(&served, "/v1/histograms?vm=web-1").json();
    let series = &one["histograms"][0];
    assert_eq!(
        (&series["metric"], one["histograms"].as_array().unwrap().len()),
        (&"runqueue_latency".into(), 6)
    );
    assert_eq!(series["counts"].as_array().unwrap().len(), 4);
    let wrong = unix(&served, "/v1/histograms?limit=1");
    assert_eq!(wrong.status, 400);
    assert!(wrong.error().contains("limit"), "{}", wrong.body);
}
