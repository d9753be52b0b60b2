//go:build !unix

package pgtest

import (
	"context"
	"errors"
	"time"
)

// startLocal needs pipes that a shell script can hold, process groups and signals.
func startLocal(context.Context) (*Server, error) {
	return nil, errors.New("not supported on this system: use PGXDRAIN_TEST_DSN or Docker")
}

// minder minds nothing here: only Stop, or testcontainers' reaper, removes a container.
type minder struct{}

func mindContainer(string, string) (*minder, error) { return nil, nil }
func (*minder) tell(string)                         {}
func (*minder) wait(time.Duration) error            { return nil }
