//! Who may do what: the claims of RUNBOOK.md's threat model.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use greenroom_tests::child::{Serving, as_nobody, greenroom, test_of_this_binary};
use greenroom_tests::engine::{Engine, Options, chain};
use greenroom_tests::sidecar::{Sidecar, until};
use sidecar::engine::client::SchedulerLink;
use sidecar::engine::frames::{Hello, Role, ToSidecar, encode};
use sidecar::engine::server::{CONNECTIONS_MAX, CONNECTIONS_PER_PROCESS_MAX};
use sidecar::engine::socket::read_frame;

/// Longer than anything here takes.
const WATCHDOG: Duration = Duration::from_secs(30);

fn hello() -> Hello {
    Hello {
        role: Role::Scheduler,
        engine: "e".into(),
        rank_bytes: 1536,
        ranks: 1,
        block_tokens: 16,
        gpu_blocks: 10,
    }
}

/// A connection on which no read waits for ever.
fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(WATCHDOG)).unwrap();
    stream
}

/// A connection that has been welcomed.
fn greet(socket: &Path, hello: Hello) -> UnixStream {
    let mut stream = connect(socket);
    stream
        .write_all(&encode(1, &ToSidecar::Hello(hello)).unwrap())
        .unwrap();
    read_frame(&stream).unwrap();
    stream
}

/// Lets everybody reach what is in a temporary folder, as if its owner had been careless.
fn open_up(folder: &Path, socket: &Path) {
    std::fs::set_permissions(folder, PermissionsExt::from_mode(0o755)).unwrap();
    std::fs::set_permissions(socket, PermissionsExt::from_mode(0o666)).unwrap();
}

/// Whether the other side closes without a word.
fn hangs_up(mut stream: UnixStream) -> bool {
    let said = encode(1, &ToSidecar::Hello(hello())).unwrap();
    // It may have hung up already.
    stream.write_all(&said).ok();
    matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_))
}

#[test]
fn another_users_process_gets_no_word_of_an_engines_socket() {
    let mut serving = Serving::start(&[]);
    let socket = serving.socket();
    std::fs::set_permissions(serving.folder(), PermissionsExt::from_mode(0o755)).unwrap();
    let theirs = socket.clone();
    let Some(refused) = as_nobody(move || UnixStream::connect(theirs).err().map(|e| e.kind()))
    else {
        return;
    };
    assert_eq!(
        refused,
        Some(std::io::ErrorKind::PermissionDenied),
        "the socket's mode"
    );
    open_up(serving.folder(), &socket);
    let theirs = socket.clone();
    let answered = as_nobody(move || !hangs_up(UnixStream::connect(theirs).unwrap()));
    assert_eq!(answered, Some(false), "the peer's user");
    drop(Engine::connect(socket, "own", 20, Options::default()));
    let log = serving.end();
    let told = "of user 65534: only processes of user 0";
    assert!(log.contains(told), "{log}");
}

#[test]
fn an_engine_tells_nothing_to_another_users_sidecar() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o777)).unwrap();
    let socket = folder.path().join("s");
    let theirs = socket.clone();
    let Some(listener) = as_nobody(move || UnixListener::bind(theirs).unwrap()) else {
        return;
    };
    let mut link = SchedulerLink::open(socket, hello(), Box::new(|| {})).unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(WATCHDOG)).unwrap();
    let mut said = Vec::new();
    stream.read_to_end(&mut said).unwrap();
    assert_eq!(said, b"");
    link.close();
}

const ENGINE: &str = "GREENROOM_TEST_OTHER_ENGINE";

/// Not a test of its own: the other process of `one_process_cannot_take_all_connections`.
#[test]
fn child_engine() {
    if let Some(socket) = std::env::var_os(ENGINE) {
        let mut engine = Engine::connect(socket.into(), "other", 50, Options::default());
        engine.turn(Some("a"), &chain(1..=20));
    }
}

#[test]
fn one_process_cannot_take_all_connections() {
    let sidecar = Sidecar::start("4MiB");
    // Workers that have said hello: nobody ends their connections.
    let open: Vec<UnixStream> = (0..CONNECTIONS_MAX)
        .map(|_| {
            let stream = connect(&sidecar.socket());
            let hello = Hello {
                role: Role::Worker { rank: 0 },
                ..hello()
            };
            // It may have been turned away already.
            (&stream)
                .write_all(&encode(1, &ToSidecar::Hello(hello)).unwrap())
                .ok();
            stream
        })
        .collect();
    let other = test_of_this_binary("security::child_engine")
        .env(ENGINE, sidecar.socket())
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(other.success());
    let welcomed = open.iter().filter(|stream| read_frame(stream).is_ok());
    assert_eq!(welcomed.count(), CONNECTIONS_PER_PROCESS_MAX);
}

/// Frames that each engine of the flood sends.
const FLOOD_FRAMES: u64 = 20_000;

/// Engines that send as fast as they can; what they send wants no answer, so nobody is cut off for not reading.
#[test]
fn engines_that_flood_leave_clients_room_in_the_queue() {
    let sidecar = Sidecar::start("4MiB");
    let frames = (2..FLOOD_FRAMES).map(|i| encode(i, &ToSidecar::Release { lease: 1 }).unwrap());
    let frames: Vec<u8> = frames.flatten().collect();
    let floods: Vec<UnixStream> = (0..40)
        .map(|engine| {
            let engine = format!("e{engine}");
            greet(&sidecar.socket(), Hello { engine, ..hello() })
        })
        .collect();
    std::thread::scope(|scope| {
        let sent = floods.iter().map(|stream| {
            let (mut stream, frames) = (stream, &frames);
            scope.spawn(move || stream.write_all(frames).unwrap())
        });
        let sent: Vec<_> = sent.collect();
        let mut answers = Vec::new();
        until("all is sent", || {
            answers.push(sidecar.status_of("/v1/status"));
            sent.iter().all(|thread| thread.is_finished())
        });
        assert!(answers.iter().all(|status| *status == 200), "{answers:?}");
    });
}

#[test]
fn half_a_frame_does_not_hold_a_connection() {
    let sidecar = Sidecar::start("4MiB");
    let mut stream = greet(&sidecar.socket(), hello());
    let message = encode(2, &ToSidecar::OpenNamespace { id: [1; 32] }).unwrap();
    stream.write_all(&message[..message.len() / 2]).unwrap();
    stream.read_to_end(&mut Vec::new()).unwrap();
}

#[test]
fn frames_that_come_twice_end_the_connection() {
    let sidecar = Sidecar::start("4MiB");
    let mut stream = greet(&sidecar.socket(), hello());
    let open = encode(2, &ToSidecar::OpenNamespace { id: [1; 32] }).unwrap();
    stream.write_all(&[&open[..], &open[..]].concat()).unwrap();
    // The answer to the first may still come.
    let ended = loop {
        if let Err(error) = read_frame(&stream) {
            break error;
        }
    };
    assert_eq!(ended.kind(), std::io::ErrorKind::UnexpectedEof);
}

const TOKEN: &str = "sesame-4f1d";
const WRONG: &str = "wrong-77ab";

/// All that a run says in logs, answers, metrics and on the command line: no token, right or wrong, and no path but the
/// socket's.
#[test]
fn nothing_that_is_said_holds_a_token_or_a_path() {
    let secrets = tempfile::tempdir().unwrap();
    let file = secrets.path().join("token-file");
    std::fs::write(&file, TOKEN).unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
    let file = file.to_str().unwrap();
    let mut serving = Serving::start(&["--token-file", file, "--log", "trace"]);
    let mut said = String::new();
    let mut engine = Engine::connect(serving.socket(), "e", 50, Options::default());
    engine.turn(Some("a"), &chain(1..=20));
    said += &provoke(&serving);
    for url in [serving.url(), "http://127.0.0.1:1"] {
        for command in ["status", "sessions"] {
            said += &greenroom(&[command, "--url", url, "--token-file", file]);
        }
        said += &greenroom(&["hint", "a", "retain", "--url", url, "--token-file", file]);
    }
    let mut stranger = UnixStream::connect(serving.socket()).unwrap();
    stranger.write_all(&[b'x'; 64]).unwrap();
    stranger.read_to_end(&mut Vec::new()).ok();
    drop(engine);
    let socket = serving.socket().to_str().unwrap().to_owned();
    let log = serving.end();
    assert!(
        log.contains(&socket) && log.contains("engine connected"),
        "{log}"
    );
    said += &log.replace(&socket, "SOCKET");
    for secret in [TOKEN, WRONG] {
        assert!(!said.contains(secret), "{secret} in {said}");
    }
    let folders = [
        "/tmp", "/home", "/root", "/proc", "/run", "/dev", "/etc", "/var", "/usr",
    ];
    let own = [
        secrets.path(),
        serving.folder(),
        Path::new(env!("CARGO_MANIFEST_DIR")),
    ];
    let paths = folders
        .into_iter()
        .chain(own.iter().filter_map(|path| path.to_str()));
    for path in paths {
        let at = said.find(path);
        let near = at.map(|at| &said[at.saturating_sub(80)..(at + 80).min(said.len())]);
        assert_eq!(near, None, "{path}");
    }
}

/// Every call, with the right token, a wrong one and none, with good bodies and bad ones; all answers.
fn provoke(serving: &Serving) -> String {
    let mut said = String::new();
    let bodies = [
        "{}",
        "{\"tool\": 7}",
        "nonsense",
        "{\"tool\": \"bash\", \"path\": \"x\"}",
        "[]",
    ];
    for (method, path) in sidecar::api::ROUTES
        .iter()
        .chain(&[("get", "/nowhere"), ("put", "/v1/hints")])
    {
        for sent in [Some(TOKEN), Some(WRONG), None] {
            for body in bodies {
                let path = path.replace("{id}", "a%2Fb");
                let mut request = ureq::http::Request::builder()
                    .method(method.to_uppercase().as_str())
                    .uri(format!("{}{path}", serving.url()));
                if let Some(token) = sent {
                    request = request.header("authorization", format!("Bearer {token}"));
                }
                let config = ureq::Agent::config_builder()
                    .http_status_as_error(false)
                    .allow_non_standard_methods(true);
                let agent = ureq::Agent::new_with_config(config.build());
                let mut answer = agent.run(request.body(body).unwrap()).unwrap();
                for (name, value) in answer.headers() {
                    said += &format!("{name}: {}\n", value.to_str().unwrap());
                }
                said += &answer.body_mut().read_to_string().unwrap();
            }
        }
    }
    said
}

/// `RUNBOOK.md` names a test beside each claim, the end of a long name left out (`…`): each of them is there.
#[test]
fn the_threat_model_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let runbook = std::fs::read_to_string(root.join("RUNBOOK.md")).unwrap();
    let page = runbook
        .split("\n## ")
        .find(|part| part.starts_with("Threat model"))
        .unwrap();
    let mut code = String::new();
    for folder in ["tests", "sidecar", "kvstore"] {
        read_all(&root.join(folder), &mut code);
    }
    let word = |c: char| !(c.is_ascii_lowercase() || c == '_' || c == '…');
    let claims = page
        .split('[')
        .skip(1)
        .filter_map(|part| part.split(']').next());
    let named: Vec<&str> = claims
        .flat_map(|claim| claim.split(word))
        .filter(|w| w.matches('_').count() > 1)
        .collect();
    assert!(named.len() > 15, "{named:?}");
    for name in named {
        let found = match name.strip_suffix('…') {
            Some(start) => {
                code.contains(&format!("fn {start}")) || code.contains(&format!("def {start}"))
            }
            None => code.contains(&format!("fn {name}(")) || code.contains(&format!("def {name}(")),
        };
        assert!(found, "there is no test {name}");
    }
}

/// The sources under a folder.
fn read_all(folder: &Path, code: &mut String) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            read_all(&path, code);
        } else if path
            .extension()
            .is_some_and(|kind| kind == "rs" || kind == "py")
        {
            *code += &std::fs::read_to_string(&path).unwrap();
        }
    }
}
