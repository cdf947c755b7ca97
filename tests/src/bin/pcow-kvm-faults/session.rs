// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! An image that is served to a machine, and the end of that.

use pcow_protocol::frontend::{Frontend, FrontendOptions};
use pcow_tests::backend::Backend;
use pcow_tests::micro_vm::{FaultPath, MicroVm};

use crate::PROCESSORS;
use crate::counts::Counts;
use crate::images::TestImage;

/// Who ends the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The frontend; then the backend is asked to end.
    FrontendFirst,
    /// The backend is asked to end while the frontend is attached.
    BackendFirst,
}

/// How a machine is made and attached.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    /// Whether the frontend knows bounces.
    pub bounce: bool,
    /// How the machine's faults come.
    pub path: FaultPath,
    /// More arguments of the backend.
    pub backend: &'a [&'a str],
}

/// What the machines of most tests are.
pub const WITH_BOUNCES: Options<'_> = Options {
    bounce: true,
    path: FaultPath::Asynchronous,
    backend: &[],
};

/// The same with a frontend that does not know bounces.
pub const WITHOUT_BOUNCES: Options<'_> = Options {
    bounce: false,
    ..WITH_BOUNCES
};

/// Backend, frontend and machine.
#[derive(Debug)]
pub struct Session {
    /// The machine. Before the others: it must not touch what nobody serves.
    pub machine: MicroVm,
    frontend: Frontend,
    backend: Backend,
}

impl Session {
    /// Serves `image` to a machine.
    pub fn start(image: &TestImage, how: Options<'_>) -> Self {
        let backend = Backend::start(&image.path, how.backend);
        let options = FrontendOptions {
            bounce: how.bounce,
            ..FrontendOptions::default()
        };
        let frontend = Frontend::connect(backend.socket(), &options).unwrap();
        let machine = MicroVm::new(&frontend, PROCESSORS, how.path);
        Self {
            machine,
            frontend,
            backend,
        }
    }

    /// Ends everything well, and returns what the backend has counted.
    pub fn end(self, end: End) -> Counts {
        let Self {
            machine,
            frontend,
            mut backend,
        } = self;
        let repeated = machine.repeated_entries();
        drop(machine);
        let counted = frontend.mapping_counts();
        println!(
            "  {} bounces and {} refused; {repeated} entries repeated",
            counted.bounces, counted.refused_bounces
        );
        if end == End::FrontendFirst {
            drop(frontend);
            backend.wait_for_log("frontend detached");
            assert!(backend.terminate().success(), "{:#?}", backend.log());
        } else {
            assert!(backend.terminate().success(), "{:#?}", backend.log());
            drop(frontend);
        }
        let counts = Counts::of(&backend);
        counts.expect_to_add_up(counted);
        counts
    }
}
