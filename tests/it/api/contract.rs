//! Every call of the contract, and every error in its one shape.

use serde_json::json;
use sidecar::api::{ApiLimits, ROUTES};

use super::Sidecar;

fn filled(path: &str) -> String {
    path.replace("{id}", "agent-7")
}

#[test]
fn every_route_is_there_and_described() {
    let sidecar = Sidecar::start();
    let described = sidecar.get("/openapi.json").json();
    for (method, path) in ROUTES {
        assert!(
            described["paths"][*path][*method].is_object(),
            "{method} {path} is not described"
        );
        let answer = sidecar.send(&method.to_uppercase(), &filled(path), b"{}");
        let unknown = answer.text.contains("unknown_route") || answer.text.contains("wrong_method");
        assert!(!unknown, "{method} {path}: {answer:?}");
    }
}

#[test]
fn health_and_status_have_the_fields_of_the_contract() {
    let sidecar = Sidecar::start();
    let health = sidecar.get("/healthz").json();
    assert_eq!(
        health,
        json!({"status": "ok", "version": env!("CARGO_PKG_VERSION"), "boot_id": "0000000000000007", "engines": 0})
    );
    let status = sidecar.get("/v1/status").json();
    for slots in ["slots_total", "slots_used", "slots_pinned", "slots_leased"] {
        assert_eq!(status["tiers"]["host"][slots], 0, "{status}");
    }
    assert_eq!(status["tiers"]["host"]["arena_bytes"], 1 << 20);
    assert_eq!(status["engines"], json!([]));
    assert!(status["sessions"].is_object() && status["counters"].is_object());
    assert_eq!(status["boot_id"], health["boot_id"]);
}

#[test]
fn a_session_lives_from_its_first_tool_to_its_retirement() {
    let sidecar = Sidecar::start();
    let tool = json!({"tool": "bash", "call_id": "c1", "detail": "make", "eta_ms": 60_000});
    let started = sidecar.post("/v1/sessions/a%2Fb%20%C3%BC/tool_start", &tool);
    assert_eq!((started.status, started.json()), (200, json!({"ok": true})));
    let session = sidecar.get("/v1/sessions/a%2Fb%20%C3%BC").json();
    assert_eq!(
        (session["id"].as_str(), session["tool"].as_str()),
        (Some("a/b ü"), Some("bash"))
    );
    assert!(
        session["expected_return_ms"]
            .as_i64()
            .is_some_and(|ms| ms <= 60_000),
        "{session}"
    );
    assert_eq!(session["blocks"], json!({"gpu": 0, "host": 0, "pinned": 0}));
    let all = sidecar.get("/v1/sessions").json();
    assert_eq!(all["sessions"].as_array().map(Vec::len), Some(1), "{all}");
    assert_eq!(all["sessions"][0]["id"], session["id"]);
    let news = sidecar.post(
        "/v1/sessions/a%2Fb%20%C3%BC/tool_progress",
        &json!({"call_id": "c1", "fraction": 0.5}),
    );
    assert_eq!(news.status, 200);
    let wrong_call = sidecar.post(
        "/v1/sessions/a%2Fb%20%C3%BC/tool_end",
        &json!({"call_id": "c2"}),
    );
    wrong_call.error(409, "unknown_call");
    let ended = sidecar.send("POST", "/v1/sessions/a%2Fb%20%C3%BC/tool_end", b"");
    assert_eq!(
        ended.status, 200,
        "an empty body leaves everything out: {ended:?}"
    );
    let retired = sidecar.send("DELETE", "/v1/sessions/a%2Fb%20%C3%BC", b"");
    assert_eq!(retired.json(), json!({"id": "a/b ü", "freed_blocks": 0}));
    sidecar
        .get("/v1/sessions/a%2Fb%20%C3%BC")
        .error(404, "unknown_session");
    sidecar
        .send("DELETE", "/v1/sessions/a%2Fb%20%C3%BC", b"")
        .error(404, "unknown_session");
    for event in ["start", "progress", "end"] {
        let series = format!("greenroom_tool_events_total{{event=\"{event}\"}}");
        assert!((sidecar.metric(&series) - 1.0).abs() < 1e-9, "{event}");
    }
}

#[test]
fn unknown_sessions_are_created_by_a_tool_start_only() {
    let sidecar = Sidecar::start();
    sidecar
        .post("/v1/sessions/new/tool_progress", &json!({}))
        .error(404, "unknown_session");
    sidecar
        .post("/v1/sessions/new/tool_end", &json!({}))
        .error(404, "unknown_session");
    sidecar
        .get("/v1/sessions/new")
        .error(404, "unknown_session");
    sidecar.make_session("new");
    assert_eq!(sidecar.get("/v1/sessions/new").status, 200);
}

#[test]
fn every_error_has_the_one_shape() {
    let sidecar = Sidecar::start();
    sidecar.get("/").error(404, "unknown_route");
    sidecar
        .get("/v1/sessions/a/b/c")
        .error(404, "unknown_route");
    sidecar
        .send("PUT", "/v1/status", b"")
        .error(405, "wrong_method");
    sidecar.get("/v1/hints").error(405, "wrong_method");
    sidecar.get("/v1/sessions/%FF").error(400, "malformed");
    sidecar.get("/v1/sessions/a%0Ab").error(400, "malformed");
    let long = "x".repeat(257);
    sidecar
        .get(&format!("/v1/sessions/{long}"))
        .error(400, "malformed");
    let posts = ROUTES.iter().filter(|(method, _)| *method == "post");
    for (_, path) in posts {
        let path = filled(path);
        for body in [
            &b"{"[..],
            b"[]",
            b"7",
            b"\xff",
            b"{\"surprise\":1}",
            b"{} {}",
        ] {
            let message = sidecar.send("POST", &path, body).error(400, "malformed");
            assert!(message.contains(':'), "{path}: {message} names nothing");
        }
    }
    let wrong = sidecar.post(
        "/v1/sessions/a/tool_start",
        &json!({"tool": "bash", "eta_ms": "soon"}),
    );
    assert!(
        wrong
            .error(400, "malformed")
            .starts_with("eta_ms: invalid type")
    );
    assert!(sidecar.metric("greenroom_commands_refused_total{reason=\"malformed\"}") > 30.0);
}

#[test]
fn a_token_is_asked_for_everywhere_but_at_the_health_check() {
    let sidecar = Sidecar::start_with(ApiLimits::default(), Some("open-sesame"));
    for (method, path) in ROUTES {
        let (method, path) = (method.to_uppercase(), filled(path));
        let answer = sidecar.send(&method, &path, b"{}");
        if path == "/healthz" {
            assert_eq!(answer.status, 200);
            continue;
        }
        answer.error(401, "unauthorized");
        assert!(answer.has_header("www-authenticate: bearer"), "{answer:?}");
        let wrong = sidecar.send_with(&method, &path, &["authorization: Bearer open-sesam"], b"{}");
        wrong.error(401, "unauthorized");
        let right = sidecar.send_with(
            &method,
            &path,
            &["authorization: Bearer open-sesame"],
            b"{}",
        );
        assert_ne!(right.status, 401, "{method} {path}");
    }
}

#[test]
fn web_pages_are_not_served() {
    let sidecar = Sidecar::start();
    let rebound = sidecar.send_with("GET", "/v1/status", &["host: evil.example:7411"], b"");
    let message = rebound.error(403, "forbidden");
    assert!(message.contains("localhost"), "{message}");
    let from_page = ["origin: http://evil.example"];
    let answer = sidecar.send_with(
        "POST",
        "/v1/sessions/a/tool_start",
        &from_page,
        b"{\"tool\":\"bash\"}",
    );
    answer.error(403, "forbidden");
    sidecar.get("/v1/sessions/a").error(404, "unknown_session");
}

#[test]
fn metrics_have_the_names_that_operators_read() {
    let sidecar = Sidecar::start();
    sidecar.make_session("a");
    sidecar.get("/v1/status");
    let answer = sidecar.get("/metrics");
    assert!(
        answer.has_header("content-type: text/plain; version=0.0.4; charset=utf-8"),
        "{answer:?}"
    );
    for name in [
        "greenroom_slots{state=\"free\"}",
        "greenroom_sessions{state=",
        "greenroom_prefetch_blocks_total{outcome=\"used\"}",
        "greenroom_copy_bytes_total{direction=\"h2d\",kind=\"demand\"}",
        "greenroom_copy_seconds_count{",
        "greenroom_hook_seconds_count{hook=\"plan\"}",
        "greenroom_hook_timeouts_total",
        "greenroom_match_blocks_total{result=\"hit\"}",
        "greenroom_evicted_blocks_total{reason=\"lru\"}",
        "greenroom_fenced_copies_total",
        "greenroom_engine_connections",
        "greenroom_arena_bytes 1048576",
        "prefetch_block_pairs_total",
        "prefetch_missing_total",
        "greenroom_http_requests_total{route=\"/v1/sessions/{id}/tool_start\",status=\"2xx\"} 1",
    ] {
        assert!(
            answer.text.contains(name),
            "{name} is missing in\n{}",
            answer.text
        );
    }
}
