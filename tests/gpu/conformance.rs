//! The suite that every engine passes, for each method.

use cuda::CopyMethod;
use cuda::conformance::run_all;

use greenroom_tests::random::seed;

use crate::rig::{Factory, METHODS, take};

#[test]
fn by_every_method() {
    let Some((_turn, gpu)) = take() else {
        return;
    };
    for method in METHODS {
        run_all(&Factory::new(&gpu, method), seed());
    }
}

/// Most slots lie on a border of two registrations here.
#[test]
fn with_registrations_of_one_page() {
    let Some((_turn, gpu)) = take() else {
        return;
    };
    for method in [CopyMethod::Single, CopyMethod::Batch, CopyMethod::Rows] {
        let factory = Factory {
            pieces: 4096,
            ..Factory::new(&gpu, method)
        };
        run_all(&factory, seed());
    }
}
