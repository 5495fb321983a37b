//! Tests of the configuration: defaults, precedence, round trip, and the sentence for everything that can be wrong.

use super::*;
use crate::config::memory::Cgroup;
use proptest::prelude::*;

const GIB: u64 = 1 << 30;

/// A machine with so much free memory.
pub(crate) fn machine(free: u64) -> Machine {
    Machine {
        memory: Memory {
            machine_free: free,
            cgroup: None,
            huge_total: 64 << 20,
            huge_free: 64 << 20,
        },
        socket: "/run/user/1000/greenroom.sock".into(),
    }
}

fn parse(text: &str) -> Result<Config, ConfigError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("greenroom.toml");
    fs::write(&path, text).unwrap();
    Config::resolve(Settings::from_file(&path)?, &machine(16 * GIB))
}

fn error(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

#[test]
fn an_empty_file_gives_the_documented_defaults() {
    let config = parse("").unwrap();
    assert_eq!(config.memory, 8 * GIB, "half of what is free");
    assert_eq!(config.page_size, PageSize::Base4K);
    assert_eq!(config.listen, Some(LISTEN_DEFAULT));
    assert_eq!(config.socket, Path::new("/run/user/1000/greenroom.sock"));
    assert_eq!(config.lease_ttl, Duration::from_secs(30));
    assert_eq!(config.log_format, LogFormat::Text);
}

#[test]
fn every_key_can_be_set_in_the_file() {
    let config = parse(
        "memory = \"3GiB\"\npage_size = \"4KiB\"\nsocket = \"/s\"\nlisten = \"0.0.0.0:1\"\ntoken_file = \"/t\"\n\
         pin_budget = 0.25\nlease_ttl = \"2500ms\"\nsessions_max = 7\ndrain_timeout = \"0s\"\nlog = \"warn\"\nlog_format = \"json\"\n",
    )
    .unwrap();
    assert_eq!(config.memory, 3 * GIB);
    assert_eq!(config.lease_ttl, Duration::from_millis(2500));
    assert_eq!(config.listen.unwrap().port(), 1);
    assert_eq!(config.sessions_max, 7);
    assert_eq!(config.log_format, LogFormat::Json);
    assert_eq!(config.drain_timeout, Duration::ZERO);
}

#[test]
fn a_flag_wins_over_the_file() {
    let file: Settings = toml::from_str("memory = \"1GiB\"\nlog = \"warn\"").unwrap();
    let flags = Settings {
        memory: Some(Size(2 * GIB)),
        ..Settings::default()
    };
    let config = Config::resolve(flags.or(file), &machine(16 * GIB)).unwrap();
    assert_eq!((config.memory, config.log.as_str()), (2 * GIB, "warn"));
}

#[test]
fn an_unknown_key_is_named() {
    let text = error("memory = \"1GiB\"\nmemroy_limit = 3\n");
    assert!(
        text.contains("memroy_limit") && text.contains("greenroom.toml"),
        "{text}"
    );
}

#[test]
fn wrong_values_are_named() {
    for (text, telling) in [
        ("memory = \"8 parsecs\"", "sizes read like 8GiB"),
        ("memory = 8", "memory"),
        ("memory = \"1000\"", "at least 1MiB"),
        ("memory = \"17GiB\"", "the machine leaves 16GiB free"),
        ("lease_ttl = \"soon\"", "durations read like 250ms"),
        ("lease_ttl = \"999ms\"", "lease_ttl must lie between"),
        ("lease_ttl = \"61m\"", "lease_ttl must lie between"),
        ("drain_timeout = \"11m\"", "drain_timeout"),
        ("pin_budget = 1.01", "pin_budget"),
        ("pin_budget = nan", "pin_budget"),
        ("pin_budget = -0.1", "pin_budget"),
        ("sessions_max = 0", "sessions_max"),
        ("listen = \"localhost\"", "ADDRESS:PORT"),
        ("page_size = \"1GiB\"", "page_size"),
        (
            "page_size = \"2MiB\"\nmemory = \"1GiB\"",
            "vm.nr_hugepages=512",
        ),
        ("log = \"a=b=c\"", "log must be"),
        ("log = \"\u{a0}\u{a0}az~[\"", "log must be"),
        ("log_format = \"xml\"", "log_format"),
    ] {
        let said = error(text);
        assert!(said.contains(telling), "{text}: {said}");
    }
}

/// A fuzzer's: as a pattern it took longer than six seconds to read.
#[test]
fn values_in_log_directives_are_no_patterns() {
    let started = std::time::Instant::now();
    let dots = ".".repeat(70);
    log_filter(&format!("warn,sidecar[hook{{turn=_b{dots}g@}}]=trace")).unwrap();
    assert!(started.elapsed().as_secs() < 3, "{:?}", started.elapsed());
}

#[test]
fn an_open_address_needs_a_token() {
    let said = error("listen = \"0.0.0.0:7411\"");
    assert!(said.contains("--token-file"), "{said}");
    assert!(error("listen = \"[::]:7411\"").contains("--token-file"));
    assert!(parse("listen = \"[::1]:7411\"").is_ok());
    assert_eq!(parse("listen = \"none\"").unwrap().listen, None);
}

#[test]
fn the_default_arena_is_capped_and_refused_where_there_is_no_room() {
    let resolve = |free| Config::resolve(Settings::default(), &machine(free));
    assert_eq!(resolve(500 * GIB).unwrap().memory, MEMORY_DEFAULT_MAX);
    assert!(matches!(resolve(1000), Err(ConfigError::NoMemory { .. })));
}

#[test]
fn the_control_group_counts_and_is_blamed() {
    let mut tight = machine(16 * GIB);
    tight.memory.cgroup = Some(Cgroup {
        folder: "/sys/fs/cgroup".into(),
        limit: 4 * GIB,
        free: 2 * GIB,
    });
    let config = Config::resolve(Settings::default(), &tight).unwrap();
    assert_eq!(config.memory, GIB);
    let asked = Settings {
        memory: Some(Size(3 * GIB)),
        ..Settings::default()
    };
    let said = Config::resolve(asked, &tight).unwrap_err().to_string();
    assert!(
        said.contains("control group") && said.contains("2GiB"),
        "{said}"
    );
}

#[test]
fn a_size_is_rounded_down_to_pages() {
    assert_eq!(
        parse("memory = \"2000000B\"").unwrap().memory,
        2_000_000 / 4096 * 4096
    );
    let huge = parse("memory = \"5MiB\"\npage_size = \"2MiB\"").unwrap();
    assert_eq!((huge.memory, huge.page_size), (4 << 20, PageSize::Huge2M));
}

#[test]
fn the_socket_goes_to_the_runtime_folder_or_a_private_one() {
    let run = tempfile::tempdir().unwrap();
    let given = socket_in(Some("/run/x".into()), 7, run.path());
    assert_eq!(given, Path::new("/run/x/greenroom.sock"));
    let temporary = socket_in(None, 7, run.path());
    assert!(
        temporary.ends_with("greenroom-7/greenroom.sock"),
        "{temporary:?}"
    );
    let relative = socket_in(Some("here".into()), 7, run.path());
    assert_eq!(
        relative, temporary,
        "a relative runtime folder means nothing"
    );
    fs::create_dir(run.path().join("7")).unwrap();
    assert_eq!(
        socket_in(None, 7, run.path()),
        run.path().join("7/greenroom.sock")
    );
}

#[test]
fn a_socket_folder_that_others_can_write_to_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let base = tempfile::tempdir().unwrap();
    let folder = base.path().join("greenroom-7");
    let socket = folder.join("greenroom.sock");
    prepare_socket_folder(&socket).unwrap();
    assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
    prepare_socket_folder(&socket).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
    let said = prepare_socket_folder(&socket).unwrap_err().to_string();
    assert!(said.contains("other users can write"), "{said}");
    let missing = base.path().join("no/such/greenroom.sock");
    assert!(prepare_socket_folder(&missing).is_err());
}

proptest! {
    /// Whatever can be set survives being written and read.
    #[test]
    fn settings_survive_a_round_trip(
        memory in proptest::option::of(1_u64..1 << 50),
        millis in proptest::option::of(1_u64..10_000_000),
        budget in proptest::option::of(0.0_f64..=1.0),
        port in proptest::option::of(any::<u16>()),
        huge in any::<bool>(),
        log in proptest::option::of("[a-z=,]{0,20}"),
    ) {
        let settings = Settings {
            memory: memory.map(Size),
            page_size: Some(if huge { Pages::Huge } else { Pages::Base }),
            listen: Some(port.map_or(Listen::None, |p| Listen::On(SocketAddr::new(LISTEN_DEFAULT.ip(), p)))),
            lease_ttl: millis.map(|ms| Span(Duration::from_millis(ms))),
            pin_budget: budget,
            log,
            ..Settings::default()
        };
        let text = toml::to_string(&settings).unwrap();
        prop_assert_eq!(toml::from_str::<Settings>(&text).unwrap(), settings, "{}", text);
    }

    /// No text makes the parsers panic, and what they take they also write.
    #[test]
    fn sizes_and_durations_never_panic(text in ".{0,24}") {
        if let Ok(size) = text.parse::<Size>() {
            prop_assert_eq!(size.to_string().parse::<Size>().unwrap(), size);
        }
        if let Ok(span) = text.parse::<Span>() {
            prop_assert_eq!(String::from(span).parse::<Span>().unwrap(), span);
        }
        drop(text.parse::<Listen>());
    }
}
